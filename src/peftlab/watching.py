"""What a run looks at in each step - loss and gradient norms - left on the device until it is time to look.

A value that is brought to the host makes the host wait for the device. So each step leaves its loss and its norms where
they are, and one look brings those of all steps since the last: whenever a step is logged, a model is validated or written,
and in the few steps in which a phase is proved. Nothing is written that was not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peftlab.errors import NonFiniteError
from peftlab.gradients import DeviceNorms, take_norms
from peftlab.probe import RunningProbe
from peftlab.proof import TrainingProof


@dataclass(frozen=True, slots=True)
class _Seen:
    """One step's gradient, not looked at yet.

    Attributes:
        step: Counted from 1.
        phase: Its phase.
        norms: Of its gradients.
        probes: Who wants them.
    """

    step: int
    phase: str
    norms: DeviceNorms
    probes: tuple[RunningProbe, ...]


class StepWatch:
    """Shows proof and probes what the steps gave.

    Args:
        parameters: Every tensor of the adapter, by name.
        proof: Sees every step.
        probes: See the steps that they want.
        rows_of_step: Ids of the rows of a step, counted from 0, for messages.
        every: Steps between two that are logged.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        proof: TrainingProof,
        probes: Mapping[str, RunningProbe],
        *,
        rows_of_step: Callable[[int], list[str]],
        every: int,
    ) -> None:
        self._parameters, self._proof, self._probes = parameters, proof, probes
        self._rows_of_step, self._every = rows_of_step, every
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._seen: list[_Seen] = []

    def note_loss(self, loss: torch.Tensor, step: int) -> None:
        """Keep the loss of a step, or of a part of it.

        Args:
            loss: A scalar.
            step: Counted from 1.
        """
        self._losses.append((step, loss.detach()))
        if self._is_due(step):
            self._check_losses()

    def note_gradients(self, step: int, phase: str, *, scale: float = 1.0) -> None:
        """Take the norms of a whole step's gradients as they stand; look where it is time.

        Args:
            step: Counted from 1.
            phase: Its phase.
            scale: What the loss was multiplied by; divided out.

        Raises:
            NonFiniteError: A loss or a gradient since the last look is NaN or infinite.
            NotTrainingError: A frozen tensor has a gradient.
        """
        wanting = tuple(probe for probe in self._probes.values() if probe.wants_gradients(step))
        self._seen.append(_Seen(step, phase, take_norms(self._parameters, scale=scale), wanting))
        if self._is_due(step):
            self.look()

    def look(self) -> None:
        """Show proof and probes all that was not looked at yet.

        Raises:
            NonFiniteError: A loss or a gradient since the last look is NaN or infinite.
            NotTrainingError: A frozen tensor has a gradient.
        """
        self._check_losses()
        seen, self._seen = self._seen, []
        for one in seen:
            reading = one.norms.read()
            self._proof.observe(reading, step=one.step)
            for probe in one.probes:
                probe.on_gradients(reading, step=one.step, phase=one.phase)

    def _is_due(self, step: int) -> bool:
        """Whether a step is looked at when it ends."""
        return self._proof.is_open or step % self._every == 0

    def _check_losses(self) -> None:
        """Find the first loss that is not finite; one transfer where there is none."""
        losses, self._losses = self._losses, []
        if not losses or bool(torch.isfinite(torch.stack([loss for _, loss in losses])).all()):
            return
        step, loss = next((step, loss) for step, loss in losses if not torch.isfinite(loss))
        rows = ", ".join(self._rows_of_step(step - 1))
        raise NonFiniteError(f"step {step}: the loss is {loss.item()}; the step's rows: {rows}")
