"""L2 norms of the gradient, per parameter group and per layer, once per optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftlab.gradient_log import GradientNormLog
from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from peftlab.gradients import Reading
    from peftlab.probe import ProbeContext


class Settings(_Settings):
    """What can be set on the gradient norms."""

    frequency: int = Field(default=1, ge=1)
    """Optimizer steps between two rows."""
    layers: bool = True
    """Whether layers are measured too, besides the groups."""


class GradientNorms:
    """The running probe.

    Args:
        context: What it may look at.
        settings: How often, and whether per layer.
    """

    def __init__(self, context: ProbeContext, settings: Settings) -> None:
        self._groups, self._settings = context.groups, settings
        self.log = GradientNormLog(clipped=context.clipped)

    def wants_gradients(self, step: int) -> bool:
        """Whether optimizer step `step` (counted from 1) is measured.

        Args:
            step: The step.
        """
        return step % self._settings.frequency == 0

    def on_gradients(self, reading: Reading, *, step: int, phase: str) -> None:
        """Record one row.

        Args:
            reading: Norms per tensor.
            step: The optimizer step, counted from 1.
            phase: The phase it belongs to.
        """
        self.log.append(step, self._groups.sum(reading, layers=self._settings.layers) | {"phase": phase})

    def state(self) -> Any:
        """JSON-ready record."""
        return self.log.to_json()

    def restore(self, state: Any, *, step: int) -> None:
        """Go on from a checkpoint's record.

        Args:
            state: As `state` gave it.
            step: Rows after this step are dropped.
        """
        self.log = GradientNormLog.from_json(state)
        self.log.truncate(step)

    def write(self, folder: Path) -> None:
        """Write the three gradient files.

        Args:
            folder: The run folder.
        """
        self.log.write(folder)


def start(context: ProbeContext, settings: Settings) -> GradientNorms:
    """Begin measuring.

    Args:
        context: What the probe may look at.
        settings: How often, and whether per layer.

    Returns:
        The running probe.
    """
    return GradientNorms(context, settings)
