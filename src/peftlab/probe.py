"""What a probe is: a measurement during training that cannot disturb it (law 3).

A leaf in `probes/` is a module with `Settings` and `start(context, settings) -> RunningProbe`. A running probe is shown
read-only readings at fixed moments, keeps its own record, and gives that record to checkpoints and to the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from peftlab.gradients import GradientGroups, Reading


@dataclass(frozen=True, slots=True)
class ProbeContext:
    """What a probe is given at the start.

    Attributes:
        groups: Sums gradient readings into groups and layers.
        clipped: Whether the gradients it will see have been clipped (plain Trainers clip first).
    """

    groups: GradientGroups
    clipped: bool = False


class RunningProbe(Protocol):
    """A probe of one run."""

    def wants_gradients(self, step: int) -> bool:
        """Whether the gradients of optimizer step `step` (counted from 1) shall be read."""
        ...

    def on_gradients(self, reading: Reading, *, step: int, phase: str) -> None:
        """See the whole step's gradient: accumulated, unscaled, before clipping."""
        ...

    def state(self) -> Any:
        """JSON-ready record, for checkpoints."""
        ...

    def restore(self, state: Any, *, step: int) -> None:
        """Go on from a checkpoint's record; rows after `step` are dropped."""
        ...

    def write(self, folder: Path) -> None:
        """Write the record into the run folder."""
        ...


@runtime_checkable
class Recording(Protocol):
    """An attachment that has something of its own to record, such as the ranks that a method gives to modules.

    Such a record belongs to the method: it is always kept, and costs nothing that the method does not do anyway.
    """

    def probes(self) -> dict[str, RunningProbe]:
        """The method's own records, by name; the method writes their rows, a run keeps them like any probe's."""
        ...


class Probe(Protocol):
    """A leaf of `probes/` (a module satisfies this)."""

    Settings: Any

    def start(self, context: ProbeContext, settings: Any) -> RunningProbe:
        """Begin measuring.

        Args:
            context: What the probe may look at.
            settings: The probe's `Settings`.

        Returns:
            The running probe.
        """
        ...
