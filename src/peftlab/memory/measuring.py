"""What a training step really takes: a run's first steps with data, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftlab.config import RunConfig
from peftlab.devices import storage_bytes
from peftlab.loading import ModelSource, load_model
from peftlab.memory.peaks import ACCOUNTS, measured_peak
from peftlab.memory.prediction import attach_method
from peftlab.memory.steps import BatchShape, make_trainer, undisturbed
from peftlab.method import Attachment, Head
from peftlab.objective import ModelLoss, labelled_loss


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


def confirm_with(source: ModelSource) -> Callable[[RunConfig, BatchShape], MeasuredPeak]:
    """A function that takes the first steps of a run with its real weights, for `choose_batch_size`.

    Args:
        source: The base; its weights are read anew each time, and let go of.

    Returns:
        From a run and its longest batch to the measured peak.
    """

    def confirm(config: RunConfig, shape: BatchShape) -> MeasuredPeak:
        attachment = attach_method(config, source)(
            load_model(source, config.model, seed=config.training.seed)
        )
        vocabulary = source.config.get_text_config().vocab_size
        return measure_step(attachment, config, shape, head=source.head, vocabulary=vocabulary)

    return confirm


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
        labelled = labelled_loss(attachment.answering, head=head, penalty=attachment.penalty)
        trainer = make_trainer(
            attachment,
            config,
            shape,
            head=head,
            vocabulary=vocabulary,
            objective=ModelLoss(head) if isinstance(labelled, str) else labelled,
            callbacks=[],
            folder=Path(folder),
        )
        with measured_peak(device) as found:
            trainer.train()
    return MeasuredPeak(weights + found[0], weights, ACCOUNTS[device.type], shape)
