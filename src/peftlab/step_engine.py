"""What a run's steps are computed with: objective and layout of rows, each tried on the run's own model and rows first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftlab.batches import Collator, Row
from peftlab.config import TrainingSettings
from peftlab.isolation import Isolation
from peftlab.layout import choose_layout, sample_rows
from peftlab.method import Attachment, Head
from peftlab.objective import Objective, choose_objective


@dataclass(frozen=True, slots=True)
class StepEngine:
    """What a run's steps are computed with.

    Attributes:
        objective: What is minimised.
        isolation: Keeps the rows of packed batches apart; None pads them.
        found: What was tried and found, for a log: "objective" and "layout".
    """

    objective: Objective
    isolation: Isolation | None
    found: dict[str, str]


def choose_engine(
    attachment: Attachment, rows: Sequence[Row], training: TrainingSettings, *, head: Head, pad_id: int
) -> StepEngine:
    """The fastest ways that give this model's loss.

    Args:
        attachment: The adapter on its base, on its device.
        rows: The training rows.
        training: What was asked for.
        head: What the model ends in.
        pad_id: The token that fills padded batches.

    Returns:
        The engine.

    Raises:
        ConfigError: A way that was asked for does not hold for this model.
    """
    model = attachment.answering
    device = next(model.parameters()).device
    batch = {n: v.to(device) for n, v in Collator(pad_id, head)(sample_rows(rows)).items()}
    objective, loss = choose_objective(model, batch, head=head, penalty=attachment.penalty)
    isolation, layout = choose_layout(
        model,
        attachment.family,
        rows,
        objective,
        head=head,
        pad_id=pad_id,
        batch_size=training.batch_size,
        wanted=training.layout,
    )
    return StepEngine(objective, isolation, {"objective": loss, "layout": layout})
