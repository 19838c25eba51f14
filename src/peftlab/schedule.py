"""What a schedule is: which tensors train at which optimizer step, and how fast. A pure function of the step.

Phases follow each other without gaps; the last one ends with the run. Nothing here touches a model: the callback in
`callbacks.py` carries out what the schedule says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator

from peftlab.errors import ScheduleError, UnknownNameError
from peftlab.settings import Settings

GROUPS = ("attention", "mlp", "embed", "lm_head", "other")
"""The parameter groups that phases and gradient norms speak of."""

_BOTH, _MLP, _ATTENTION = GROUPS, ("mlp",), ("attention",)
STRATEGIES: dict[str, tuple[tuple[str, tuple[str, ...], str | None], ...]] = {
    "both->mlp->attn": (("both", _BOTH, None), ("mlp", _MLP, None), ("attention", _ATTENTION, None)),
    "attn->mlp->both": (("attention", _ATTENTION, None), ("mlp", _MLP, None), ("both", _BOTH, None)),
    "both->mlp->both": (("both", _BOTH, None), ("mlp", _MLP, None), ("both again", _BOTH, None)),
    "early->late": (
        ("early", ("attention", "mlp", "embed"), "early"),
        ("late", ("attention", "mlp", "lm_head", "other"), "late"),
    ),
}
"""Strategy name to its phases: (name, groups, half of the layers or None for all)."""

Curve = Literal["cosine", "linear", "constant"]


class LearningRateSettings(Settings):
    """A phase's own learning-rate curve, counted from the phase's first step."""

    peak: float = Field(gt=0)
    """Highest learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from zero."""
    curve: Curve = "cosine"
    """How it falls from the peak to the end of the phase."""


class PhaseSettings(Settings):
    """One phase as a person writes it."""

    name: str = ""
    """What the phase is called in logs and plots; made from the groups where empty."""
    steps: int | None = Field(default=None, gt=0)
    """Length in optimizer steps; None, for the last phase only, means to the end of the run."""
    groups: tuple[str, ...] = ("attention", "mlp")
    """Groups (attention, mlp, embed, lm_head, other) or roles (e.g. attention.query) that train."""
    layers: tuple[int, int] | None = None
    """First and last layer that train, both included; None means all."""
    half: Literal["early", "late"] | None = None
    """Half of each stack's layers; the early half of n is the first floor(n/2)."""
    learning_rate: LearningRateSettings | None = None
    """The phase's own curve; None means the run's curve goes on."""
    moments: Literal["keep", "reset"] = "keep"
    """Whether the optimizer's moments of the phase's tensors are kept or cleared on entry."""

    @model_validator(mode="after")
    def _consistent(self) -> PhaseSettings:
        if not self.groups:
            raise ValueError("a phase must name at least one group or role")
        if self.layers is not None and self.half is not None:
            raise ValueError("give 'layers' or 'half', not both")
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers {list(self.layers)} is not a range: first <= last, counted from 0")
        return self


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase with its place in the run.

    Attributes:
        name: What it is called.
        start_step: First optimizer step, counted from 0.
        end_step: The step after its last one.
        groups: Groups or roles that train.
        layers: First and last layer that train, both included, or None for all.
        half: "early", "late" or None.
        learning_rate: Its own curve or None.
        moments: "keep" or "reset".
    """

    name: str
    start_step: int
    end_step: int
    groups: tuple[str, ...] = GROUPS
    layers: tuple[int, int] | None = None
    half: str | None = None
    learning_rate: LearningRateSettings | None = None
    moments: str = "keep"

    def trains(self, *, group: str, role: str, layer: int | None, num_layers: int) -> bool:
        """Whether a tensor trains in this phase.

        Args:
            group: The tensor's group.
            role: The tensor's role, e.g. "attention.query".
            layer: Its layer in its stack; None outside the stacks, where only the group decides.
            num_layers: Number of layers of its stack.

        Returns:
            True where the tensor is active.
        """
        if group not in self.groups and role not in self.groups:
            return False
        if layer is None:
            return True
        if self.layers is not None:
            return self.layers[0] <= layer <= self.layers[1]
        if self.half is not None:
            return (layer < num_layers // 2) == (self.half == "early")
        return True


@dataclass(frozen=True, slots=True)
class Schedule:
    """The phases of a run and its learning-rate curve.

    Attributes:
        phases: At least one; contiguous from step 0 to `total_steps`.
        total_steps: Length of the run in optimizer steps.
        learning_rate: Peak of the run's curve.
        warmup_steps: Warm-up of the run's curve.
        curve: Shape of the run's curve.
    """

    phases: tuple[Phase, ...]
    total_steps: int
    learning_rate: float = 2e-4
    warmup_steps: int = 10
    curve: Curve = "cosine"
    _starts: Mapping[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_contiguous(self.phases, self.total_steps)
        if not any(self.learning_rate_at(step) > 0 for step in range(self.total_steps)):
            raise ScheduleError(
                f"the learning rate is zero at every one of the {self.total_steps} steps: a warm-up of"
                f" {self.warmup_steps} steps begins at zero; lower training.warmup_steps or raise training.max_steps"
            )
        object.__setattr__(self, "_starts", {phase.start_step: i for i, phase in enumerate(self.phases)})

    def index_at(self, step: int) -> int:
        """The index of the phase that optimizer step `step` (from 0) belongs to; the last one from the end on."""
        for index, phase in enumerate(self.phases):
            if step < phase.end_step:
                return index
        return len(self.phases) - 1

    def phase_at(self, step: int) -> Phase:
        """The phase that optimizer step `step` (from 0) belongs to."""
        return self.phases[self.index_at(step)]

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0).

        The run's curve is transformers' `get_cosine_schedule_with_warmup` (or its linear and constant siblings):
        w(t) = t / warmup, then (1 + cos(pi p)) / 2 with p = (t - warmup) / (total - warmup). A phase with its own curve
        uses the same formulas, counted from its first step over its own length.
        """
        phase = self.phase_at(step)
        if phase.learning_rate is None:
            return self.learning_rate * _factor(step, self.total_steps, self.warmup_steps, self.curve)
        own = phase.learning_rate
        length = phase.end_step - phase.start_step
        return own.peak * _factor(step - phase.start_step, length, own.warmup_steps, own.curve)


def _factor(step: int, total: int, warmup: int, curve: Curve) -> float:
    """Learning rate at a step as a share of its peak.

    Args:
        step: Steps since the curve began.
        total: Length of the curve.
        warmup: Steps of warm-up.
        curve: Shape after the warm-up.

    Returns:
        A number from 0 to 1.

    Source: transformers `optimization.py`, `get_{cosine,linear,constant}_schedule_with_warmup`.
    """
    if step < warmup:
        return step / max(1, warmup)
    if curve == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if curve == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def canonical_strategy(name: str) -> str:
    """A strategy's name from any of its spellings.

    Args:
        name: E.g. "both->mlp->attn" or the shell-safe "both-mlp-attn", "both,mlp,attention".

    Returns:
        The canonical name.

    Raises:
        UnknownNameError: No such strategy.

    Example:
        >>> canonical_strategy("both-mlp-attn")
        'both->mlp->attn'
    """
    words = [w for w in name.replace("->", "-").replace(",", "-").replace(">", "-").split("-") if w]
    joined = "->".join("attn" if w in {"attn", "attention"} else w for w in words)
    if joined not in STRATEGIES:
        raise UnknownNameError("strategy", name, STRATEGIES)
    return joined


def strategy_phases(
    name: str, *, total_steps: int, ends: Sequence[int | None] = ()
) -> tuple[PhaseSettings, ...]:
    """The phases of a named strategy.

    Args:
        name: A strategy in any spelling.
        total_steps: Length of the run.
        ends: Where phases end (phase1_end, phase2_end, ...); None or missing ones divide what is left evenly.

    Returns:
        The phases, the last one open.

    Raises:
        ScheduleError: The ends are not ordered, lie outside the run, or are more than the strategy has.
    """
    plan = STRATEGIES[canonical_strategy(name)]
    given = list(ends) + [None] * (len(plan) - 1 - len(ends))
    extra = [i for i, end in enumerate(given[len(plan) - 1 :]) if end is not None]
    if extra:
        raise ScheduleError(
            f"strategy '{canonical_strategy(name)}' has {len(plan)} phases,"
            f" so phase{len(plan) + extra[0]}_end has no meaning"
        )
    settings, start = [], 0
    for index, (phase_name, groups, half) in enumerate(plan[:-1]):
        end = given[index]
        if end is None:
            end = start + (total_steps - start) // (len(plan) - index)
        if not start < end < total_steps:
            raise ScheduleError(
                f"phase{index + 1}_end {end} does not fit: it must lie after {start} and before the run's"
                f" {total_steps} steps (--max_steps)"
            )
        settings.append(PhaseSettings(name=phase_name, steps=end - start, groups=groups, half=half))
        start = end
    phase_name, groups, half = plan[-1]
    return (*settings, PhaseSettings(name=phase_name, groups=groups, half=half))


def place_phases(settings: Sequence[PhaseSettings], *, total_steps: int) -> tuple[Phase, ...]:
    """Give phases their place in a run.

    Args:
        settings: The phases in order; only the last may be open.
        total_steps: Length of the run.

    Returns:
        The placed phases; one phase with all groups where none are given.

    Raises:
        ScheduleError: A phase before the last is open, or the lengths do not add up to the run.
    """
    if not settings:
        return (Phase("all", 0, total_steps),)
    placed, start = [], 0
    for index, phase in enumerate(settings):
        name = phase.name or "+".join(phase.groups)
        if phase.steps is None and index < len(settings) - 1:
            raise ScheduleError(f"phase '{name}' has no length; only the last phase may be open")
        end = total_steps if phase.steps is None else start + phase.steps
        placed.append(
            Phase(
                name, start, end, phase.groups, phase.layers, phase.half, phase.learning_rate, phase.moments
            )
        )
        start = end
    return tuple(placed)


def _check_contiguous(phases: tuple[Phase, ...], total_steps: int) -> None:
    """Refuse phases that leave gaps, overlap, are empty or do not cover the run.

    Args:
        phases: The placed phases.
        total_steps: Length of the run.

    Raises:
        ScheduleError: They do not fit; says which and how.
    """
    expected = 0
    for phase in phases:
        if phase.start_step != expected:
            what = "a gap" if phase.start_step > expected else "an overlap"
            raise ScheduleError(
                f"phase '{phase.name}' starts at step {phase.start_step}, expected {expected}: phases leave {what}"
            )
        if phase.end_step <= phase.start_step:
            raise ScheduleError(
                f"phase '{phase.name}' has no steps left: it starts at {phase.start_step} of {total_steps}"
            )
        expected = phase.end_step
    if expected != total_steps:
        raise ScheduleError(
            f"the phases cover {expected} steps but the run has {total_steps}; change the phases or training.max_steps"
        )
