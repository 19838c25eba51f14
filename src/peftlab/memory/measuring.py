"""What a training step really takes: a run's first steps with data, measured."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from peftlab.config import RunConfig
from peftlab.devices import storage_bytes
from peftlab.memory.peaks import ACCOUNTS, measured_peak
from peftlab.memory.steps import BatchShape, make_trainer, undisturbed
from peftlab.method import Attachment, Head
from peftlab.objective import ModelLoss


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """The peak memory of training steps that were taken.

    Attributes:
        peak_bytes: Bytes of tensors at the peak, weights included.
        weights_bytes: Bytes of parameters and buffers.
        account: What was measured and by what.
        shape: The batch.
    """

    peak_bytes: int
    weights_bytes: int
    account: str
    shape: BatchShape


def measure_step(
    attachment: Attachment, config: RunConfig, shape: BatchShape, *, head: Head, vocabulary: int
) -> MeasuredPeak:
    """Take the first steps of a run on its longest batch and measure them.

    Args:
        attachment: What is trained, on its device; it has been trained afterwards and is of no further use.
        config: The run.
        shape: The longest batch.
        head: What the model ends in.
        vocabulary: Tokens that the model knows.

    Returns:
        The peak.

    Raises:
        ModelError: The device does not tell its memory.
    """
    model = attachment.model
    device = next(model.parameters()).device
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    with tempfile.TemporaryDirectory() as folder, undisturbed():
        trainer = make_trainer(
            attachment,
            config,
            shape,
            head=head,
            vocabulary=vocabulary,
            objective=ModelLoss(head),
            callbacks=[],
            folder=Path(folder),
        )
        with measured_peak(device) as found:
            trainer.train()
    return MeasuredPeak(weights + found[0], weights, ACCOUNTS[device.type], shape)
