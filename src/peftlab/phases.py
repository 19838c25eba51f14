"""Carrying out a schedule on a live model: which tensors require a gradient, which moments are cleared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from peftlab.errors import ScheduleError
from peftlab.family import FamilyMap
from peftlab.schedule import GROUPS, Phase, Schedule


class PhaseSwitch:
    """Applies phases to an adapter's tensors.

    Args:
        schedule: What trains when.
        family: The map of the model as it stands, adapter included.
        parameters: Every tensor of the adapter, by name.
        model: The model as it stands; None leaves dropout alone.

    Raises:
        ScheduleError: A phase names a group, role or layer that this adapter does not have, or trains nothing.
    """

    def __init__(
        self,
        schedule: Schedule,
        family: FamilyMap,
        parameters: Mapping[str, nn.Parameter],
        model: nn.Module | None = None,
    ) -> None:
        self.schedule, self._parameters = schedule, parameters
        self._dropouts = list(_adapter_dropouts(model)) if model is not None else []
        self._sites = {name: family.locate(name) for name in parameters}
        self._num_layers = {name: family.num_blocks(site.stack) for name, site in self._sites.items()}
        self.index: int | None = None
        for phase in schedule.phases:
            self._check(phase, family)

    def _check(self, phase: Phase, family: FamilyMap) -> None:
        """Refuse a phase that does not fit the adapter."""
        roles = sorted({site.role for site in self._sites.values()})
        for group in phase.groups:
            if group not in GROUPS and group not in roles:
                raise ScheduleError(
                    f"phase '{phase.name}': '{group}' is neither a group ({', '.join(GROUPS)}) nor a role of this"
                    f" adapter ({', '.join(roles)})"
                )
        deepest = max(family.stacks.values())
        if phase.layers is not None and phase.layers[1] >= deepest:
            raise ScheduleError(
                f"phase '{phase.name}': layers {list(phase.layers)} go beyond this model's {deepest} layers"
                f" (0 to {deepest - 1})"
            )
        if not self.active(phase):
            groups = sorted({site.group for site in self._sites.values()})
            raise ScheduleError(
                f"phase '{phase.name}' ({', '.join(phase.groups)}) trains nothing: the adapter has tensors in"
                f" {', '.join(groups)}; widen method.targets or change the phase"
            )

    def active(self, phase: Phase) -> dict[str, nn.Parameter]:
        """The tensors that train in a phase.

        Args:
            phase: A phase of the schedule.

        Returns:
            Name to parameter.
        """
        return {
            name: parameter
            for name, parameter in self._parameters.items()
            if phase.trains(
                group=self._sites[name].group,
                role=self._sites[name].role,
                layer=self._sites[name].layer,
                num_layers=self._num_layers[name],
            )
        }

    def active_groups(self, phase: Phase) -> list[str]:
        """The groups in which a phase trains at least one tensor, in the fixed order."""
        there = {self._sites[name].group for name in self.active(phase)}
        return [group for group in GROUPS if group in there]

    def describe(self, phase: Phase) -> dict[str, Any]:
        """What a phase trains.

        Args:
            phase: A phase of the schedule.

        Returns:
            JSON-ready: phase, index, groups, trainable tensors and parameters, learning rate at its first step.
        """
        active = self.active(phase)
        return {
            "phase": phase.name,
            "index": self.schedule.phases.index(phase),
            "groups": self.active_groups(phase),
            "trainable_tensors": len(active),
            "trainable_parameters": sum(p.numel() for p in active.values()),
            "learning_rate": self.schedule.learning_rate_at(phase.start_step),
        }

    def apply(self, step: int, optimizer: Optimizer | None) -> Phase | None:
        """Put the model into the phase of a step.

        Args:
            step: The optimizer step about to be taken, from 0.
            optimizer: Its moments of the phase's tensors are cleared where the phase says so and begins here.

        Returns:
            The phase where it was entered now, else None.
        """
        index = self.schedule.index_at(step)
        if index == self.index:
            return None
        self.index = index
        phase = self.schedule.phases[index]
        active = self.active(phase)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None  # AdamW skips a tensor without a gradient: no decay, no momentum
        for dropout in self._dropouts:
            dropout.follow()
        if optimizer is not None and phase.moments == "reset" and step == phase.start_step:
            for parameter in active.values():
                optimizer.state.pop(parameter, None)
        return phase

    def end(self) -> None:
        """Give adapters that rested their dropout back."""
        for dropout in self._dropouts:
            dropout.restore()


@dataclass(frozen=True, slots=True)
class _AdapterDropout:
    """The dropout in front of one adapter: an adapter that rests in a phase runs without, so that it stays one function.

    Attributes:
        module: The dropout.
        rate: Its rate.
        tensors: The adapter's tensors.
    """

    module: nn.Dropout
    rate: float
    tensors: tuple[nn.Parameter, ...]

    def follow(self) -> None:
        """Drop only where a tensor trains."""
        self.module.p = self.rate if any(tensor.requires_grad for tensor in self.tensors) else 0.0

    def restore(self) -> None:
        """Drop as at the start."""
        self.module.p = self.rate


def _adapter_dropouts(model: nn.Module) -> Iterator[_AdapterDropout]:
    """The dropouts of LoRA and its like, one for each adapted module and adapter."""
    for layer in model.modules():
        dropouts = getattr(layer, "lora_dropout", None)
        if not isinstance(dropouts, nn.ModuleDict):
            continue
        for name, dropout in dropouts.items():
            own = [p for path, p in layer.named_parameters() if name in path.split(".")]
            if isinstance(dropout, nn.Dropout):
                yield _AdapterDropout(dropout, dropout.p, tuple(own))
