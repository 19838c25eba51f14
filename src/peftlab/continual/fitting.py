"""Train what a method has attached on some rows, through the one trainer: a stage of a course, a task of a learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.batches import Collator, Row
from peftlab.config import RunConfig
from peftlab.errors import Interrupted
from peftlab.fit import Fit
from peftlab.method import Attachment, Head
from peftlab.progress import RunCallback
from peftlab.run import RunFolder
from peftlab.step_engine import choose_engine
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, make_arguments


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a training came to.

    Attributes:
        steps: Optimizer steps.
        seconds: Time that this process trained; 0 where all had been trained before.
        validation_loss: The lowest validation loss; None where none was computed.
    """

    steps: int
    seconds: float
    validation_loss: float | None


def fit_rows(
    attachment: Attachment,
    rows: Sequence[Row],
    validation_rows: Sequence[Row],
    config: RunConfig,
    folder: Path,
    *,
    pad_id: int,
    head: Head,
) -> Fitted:
    """Train an attachment as a run does, from the last checkpoint in the folder where there is one.

    The last step's values are in place afterwards, so that equal steps are equal steps.

    Args:
        attachment: What trains, as it stands.
        rows: Rows to train on.
        validation_rows: Rows whose loss is logged.
        config: Its training section and device.
        folder: For checkpoints and events; made if needed.
        pad_id: The token that fills padded batches.
        head: What the model ends in.

    Returns:
        What came out.

    Raises:
        RunError: Something that shall train does not, or a loss is not finite.
        Interrupted: A signal stopped it; it goes on from the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, training = RunFolder(folder), config.training
    callback = RunCallback(patience=None, quiet=True)
    engine = choose_engine(attachment, rows, training, head=head, pad_id=pad_id)
    schedule = config.make_schedule()
    parts = TrainingParts(
        attachment=attachment,
        schedule=schedule,
        objective=engine.objective,
        collator=Collator(pad_id, head),
        train_rows=rows,
        validation_rows=validation_rows,
        event=run.append_event,
        keep_checkpoints=training.keep_checkpoints,
        seed=training.seed,
        **engine.layout(),
    )
    trainer: Any = LabTrainer(parts, make_arguments(config, run.checkpoints, schedule), [callback])
    callback.watch(trainer)
    seconds: dict[str, float] = {}
    try:
        done = Fit(run, trainer, callback, _silent, seconds).carry_out(select_best=False)
    except Interrupted as error:
        raise Interrupted(f"{str(error).partition(';')[0]}; give the same command again to go on") from None
    best = done["best_checkpoint"]
    loss = None if best is None else float(best["validation_loss"])
    return Fitted(int(done["steps"]), seconds.get("train", 0.0), loss)


def _silent(_: str) -> None:
    """Shows nothing: a course has lines of its own."""
