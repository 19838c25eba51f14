"""Which method does best on one base and task: scores, parameters, seconds and memory of each, at its best learning rate.

All methods see the same rows in the same order for the same number of steps and are asked in the same way. The learning rate
of each is the one of the lowest validation loss after shorter runs, as many for every method; the test examples are looked
at for the table alone. Each run has a process of its own, so that its peak of memory is its own. The efficient fine-tuning
document's claims are measured beside it: the share of parameters, the memory and the speed of convergence against `full`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import field_validator

from peftlab.catalog import METHODS
from peftlab.config import RunConfig
from peftlab.errors import InputError
from peftlab.losses import read_losses
from peftlab.study.carrying import Carried, DoneRun
from peftlab.study.planning import make_config
from peftlab.study.settings import Factors, StudySettings
from peftlab.study.telling import Table

QUESTION = "Which method learns best here, and what does it cost?"
_WITHOUT_SETTINGS = ("peft",)  # its type has no default: it is tried where it is named with one
_FULL = "full"
_SHARES, _MEMORY = (0.01, 0.05), (10.0, 100.0)


class Settings(StudySettings):
    """What can be set on the comparison."""

    methods: tuple[str, ...] = ()
    """The methods; none is all that need no settings and apply to the model."""
    factors: Factors = (0.32, 1.0, 3.2)
    """Factors on the learning rate that a method begins with: the preset's times the method's `RATE_TO_LORA`."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(METHODS.check(name) for name in methods)


def arms(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every method that applies, at the learning rate that it begins with.

    Args:
        settings: What was set.

    Raises:
        InputError: No method applies.
    """
    refused = _refused(settings)
    found = {n: _changes(settings, n) for n in settings.methods or _plain_methods() if n not in refused}
    if not found:
        raise InputError("no method applies: " + "; ".join(f"{n}: {why}" for n, why in refused.items()))
    return found


def notes(settings: Settings) -> list[str]:
    """Which methods are left out, and why.

    Args:
        settings: What was set.
    """
    return [f"Left out: {name}: {why}" for name, why in _refused(settings).items()]


def tables(carried: Carried) -> list[Table]:
    """The document's claims, measured against full fine-tuning where that was run.

    Args:
        carried: The runs.
    """
    if _FULL not in carried.done:
        return []
    full = carried.done[_FULL]
    rows = [
        [
            "method",
            "trains 1-5 %",
            "memory of full by its own",
            "10-100 x",
            "steps to full's loss at half its run",
        ]
    ]
    for name, runs in carried.done.items():
        if name == _FULL:
            continue
        first = runs[0].result
        share = first["trainable_parameters"] / first["total_parameters"]
        ratio = _mean(full, "peak_memory_bytes") / _mean(runs, "peak_memory_bytes")
        told = "yes" if _SHARES[0] <= share <= _SHARES[1] else f"no: {share:.2%}"
        rows.append([name, told, f"{ratio:.2f}", _inside(ratio), _convergence(runs, full)])
    return [Table("What the document claims, measured", rows)]


def _inside(ratio: float) -> str:
    """Whether a memory ratio is what the document says."""
    return "yes" if _MEMORY[0] <= ratio <= _MEMORY[1] else "no"


def _convergence(runs: Sequence[DoneRun], full: Sequence[DoneRun]) -> str:
    """Steps until a validation loss as low as full's at half its run, against full's, the median over seeds."""
    found, own = [], []
    for run, other in zip(runs, full, strict=True):
        theirs = read_losses(other.run)
        half = [(s, v) for s, v in zip(theirs.validation_steps, theirs.validation, strict=True)
                if 2 * s <= other.result["steps"]]  # fmt: skip
        if not half:
            return "-"
        step, wanted = min(half, key=lambda pair: pair[1])
        mine = read_losses(run.run)
        reached = [s for s, v in zip(mine.validation_steps, mine.validation, strict=True) if v <= wanted]
        own.append(step)
        found.append(min(reached) if reached else None)
    if any(step is None for step in found):
        return f"not reached by {sum(step is None for step in found)} of {len(found)} seeds"
    steps = statistics.median(step for step in found if step is not None)
    theirs_step = statistics.median(own)
    verdict = "faster" if steps < theirs_step else "as fast" if steps == theirs_step else "slower"
    return f"{steps:g} against {theirs_step:g}: {verdict}"


def _mean(runs: Sequence[DoneRun], key: str) -> float:
    """The mean of what the runs came to."""
    return statistics.fmean(float(run.result[key]) for run in runs)


def _plain_methods() -> tuple[str, ...]:
    """The methods that need no settings."""
    return tuple(name for name in METHODS.names() if name not in _WITHOUT_SETTINGS)


def _changes(settings: Settings, name: str) -> dict[str, Any]:
    """The config keys of one method."""
    leaf = METHODS.load(name)
    plain = make_config(name, {"schedule.strategy": None}, settings, Path(), seed=0)
    rate = plain.training.learning_rate * getattr(leaf, "RATE_TO_LORA", 1.0)
    changes: dict[str, Any] = {
        "schedule.strategy": None,
        "method.name": name,
        "training.learning_rate": float(f"{rate:.2g}"),
    }
    if "dropout" in leaf.Settings.model_fields:
        changes["method.dropout"] = plain.adapters[0].settings.get("dropout", 0.0)
    return changes


def _refused(settings: Settings) -> dict[str, str]:
    """The methods that cannot be run here, and why."""
    return dict(_ask(settings.model_dump_json()))


@cache
def _ask(settings: str) -> tuple[tuple[str, str], ...]:
    """Method and reason, asked once: the model's config and the rows are read for each."""
    asked = Settings.model_validate_json(settings)
    found = []
    for name in asked.methods or _plain_methods():
        why = _refusal(make_config(name, _changes(asked, name), asked, Path(), seed=0))
        if why:
            found.append((name, why))
    return tuple(found)


def _refusal(config: RunConfig) -> str:
    """Why a method cannot be run here; "" where it can."""
    from peftlab.errors import ConfigError, MethodError, TargetError
    from peftlab.resolve import resolve

    try:
        resolve(config)
    except (MethodError, TargetError, ConfigError) as error:
        return str(error)
    return ""
