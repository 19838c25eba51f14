"""The first steps of a run on its longest batch: what is rehearsed without data and measured with it.

Everything is the run's own: `LabTrainer`, its arguments and optimizer, the phases, the clipping, the proof. A phase is cut
to two steps, since the optimizer's state exists from the second on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftlab.batches import IGNORED, Collator, Row
from peftlab.config import RunConfig
from peftlab.method import Attachment, Head
from peftlab.objective import Objective
from peftlab.schedule import Schedule
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, make_arguments

_STEPS_OF_A_PHASE = 2
_MOST_ACCUMULATED = 2
"""In the second forward pass of a step gradients stand beside activations; a third adds nothing."""
_RATE = 0.03
"""A learning rate that moves a bfloat16 weight of one, so that training is proved; the tensors are thrown away."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The longest batch of a run.

    Attributes:
        rows: Rows of one forward pass.
        length: Tokens of the longest row.
        label_length: Labels of the longest row; only models with a decoder of their own have another number of them.
        labelled: Tokens of a row that carry a label, for models without such a decoder; None is all but the first.
    """

    rows: int
    length: int
    label_length: int
    labelled: int | None = None

    def make_row(self, head: Head, *, vocabulary: int, shorter: int = 0) -> Row:
        """The longest row.

        Args:
            head: What the model ends in.
            vocabulary: Tokens that the model knows.
            shorter: Tokens to leave out.

        Returns:
            A row of random tokens.
        """
        draw = random.Random(0)
        tokens = [draw.randrange(vocabulary) for _ in range(self.length - shorter)]
        labelled = len(tokens) - 1 if self.labelled is None else min(self.labelled, len(tokens) - 1)
        labels = {
            "causal": [IGNORED] * (len(tokens) - labelled) + tokens[len(tokens) - labelled :],
            "seq2seq": [draw.randrange(vocabulary) for _ in range(self.label_length - shorter)],
            "classification": [0],
        }
        return Row("longest", tokens, labels[head])

    def labelled_rows(self, head: Head) -> int:
        """Labels of the whole batch, as `LongestBatch` lays it out.

        Args:
            head: What the model ends in.
        """
        rows = [self.make_row(head, vocabulary=1, shorter=int(i == 0 and self.rows > 1)) for i in range(2)]
        first, other = (sum(label != IGNORED for label in row.labels) for row in rows)
        return first + (self.rows - 1) * other


class LongestBatch(Collator):
    """A collator that gives the longest batch whatever it is given, laid out as the run's own would.

    Of several rows the first is a token shorter, so that the batch has a pad: with pads attention takes more.

    Args:
        shape: The batch.
        head: What the model ends in.
        vocabulary: Tokens that the model knows.
    """

    def __init__(self, shape: BatchShape, *, head: Head, vocabulary: int) -> None:
        super().__init__(0, head)
        self._rows = shape.rows
        self.longest = shape.make_row(head, vocabulary=vocabulary)
        self._shorter = shape.make_row(head, vocabulary=vocabulary, shorter=1)

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The longest batch.

        Args:
            rows: Not looked at.

        Returns:
            input_ids and attention_mask (batch, seq), and labels, as `Collator` gives them.
        """
        if self._rows == 1:
            return super().__call__([self.longest])
        pair = super().__call__([self._shorter, self.longest])
        return {
            name: torch.cat([both[:1], both[1:].expand(self._rows - 1, *both.shape[1:])])
            for name, both in pair.items()
        }


def make_trainer(
    attachment: Attachment,
    config: RunConfig,
    shape: BatchShape,
    *,
    head: Head,
    vocabulary: int,
    objective: Objective,
    callbacks: Sequence[Any],
    folder: Path,
) -> LabTrainer:
    """The trainer of a run's first steps.

    Args:
        attachment: What is trained.
        config: The run.
        shape: The longest batch.
        head: What the model ends in.
        vocabulary: Tokens that the model knows.
        objective: What is minimised.
        callbacks: Further callbacks.
        folder: An empty folder; nothing is written into it.

    Returns:
        The trainer; `train` takes the steps.
    """
    schedule = _shortened(config.make_schedule())
    training = config.training.model_copy(
        update={
            "max_steps": schedule.total_steps,
            "learning_rate": _RATE,
            "batch_size": shape.rows,
            "accumulation_steps": min(config.training.accumulation_steps, _MOST_ACCUMULATED),
            "trackers": (),
        }
    )
    arguments = make_arguments(config.model_copy(update={"training": training}), folder, schedule)
    arguments.save_strategy = arguments.eval_strategy = arguments.logging_strategy = "no"
    longest = LongestBatch(shape, head=head, vocabulary=vocabulary)
    rows = [longest.longest] * (shape.rows * training.accumulation_steps * schedule.total_steps)
    whole = _WholeRun(attachment, config.make_schedule())
    parts = TrainingParts(whole, schedule, objective, longest, rows, [], seed=training.seed)
    return LabTrainer(parts, arguments, list(callbacks))


class _WholeRun:
    """An attachment that is told of the whole run: a method that lays out its steps would find too few in these.

    Args:
        attachment: What is trained.
        schedule: The run's own.
    """

    def __init__(self, attachment: Attachment, schedule: Schedule) -> None:
        self._attachment, self._schedule = attachment, schedule

    def __getattr__(self, name: str) -> Any:
        """Everything else is the attachment's own."""
        return getattr(self._attachment, name)

    def prepare(self, batches: Iterable[Any]) -> None:
        """Told before training; where A and B start makes no difference to memory."""

    def begin(self, schedule: Schedule) -> None:
        """Told before training; what is told here are its first steps alone."""
        self._attachment.begin(self._schedule)


def _shortened(schedule: Schedule) -> Schedule:
    """The schedule with each phase cut to its first steps; a warm-up still begins at a learning rate of zero."""
    phases, start = [], 0
    for phase in schedule.phases:
        own = phase.learning_rate
        if own is not None:
            own = own.model_copy(update={"peak": _RATE, "warmup_steps": min(1, own.warmup_steps)})
        end = start + _STEPS_OF_A_PHASE
        phases.append(replace(phase, start_step=start, end_step=end, learning_rate=own))
        start = end
    return Schedule(tuple(phases), start, _RATE, min(1, schedule.warmup_steps), "constant")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the random streams of Python, numpy and torch as they were: a trainer seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
