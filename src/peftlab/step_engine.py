"""What a run's steps are computed with: objective and layout of rows, each tried on the run's own model and rows first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.batches import Collator, Row
from peftlab.config import TrainingSettings
from peftlab.grouping import Grouping
from peftlab.isolation import Isolation
from peftlab.layout import choose_grouping, choose_layout, sample_rows
from peftlab.method import Attachment, Head
from peftlab.objective import Objective, choose_objective


@dataclass(frozen=True, slots=True)
class StepEngine:
    """What a run's steps are computed with.

    Attributes:
        objective: What is minimised.
        isolation: Keeps the rows of packed batches apart; None pads them.
        grouping: Divides padded batches into groups of like length; None leaves them whole.
        found: What was tried and found, for a log: "objective" and "layout".
    """

    objective: Objective
    isolation: Isolation | None
    grouping: Grouping | None
    found: dict[str, str]

    def layout(self) -> dict[str, Any]:
        """How rows lie, as `TrainingParts` takes it."""
        return {"isolation": self.isolation, "grouping": self.grouping}


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
    size, wanted = training.batch_size, training.layout
    isolation, layout = choose_layout(
        model, attachment.family, rows, objective, head=head, pad_id=pad_id, batch_size=size, wanted=wanted
    )
    grouping = None
    if isolation is None:
        grouping, why = choose_grouping(
            model, rows, objective, head=head, pad_id=pad_id, batch_size=size, wanted=wanted
        )
        layout = f"{layout}; {why}"
    return StepEngine(objective, isolation, grouping, {"objective": loss, "layout": layout})
