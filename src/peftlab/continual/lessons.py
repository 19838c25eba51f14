"""The tasks of a sequence, ready to be learned and asked: rows and test examples, the same for every arm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from peftlab.batches import Row, RowBuilder
from peftlab.catalog import TASKS
from peftlab.config import TaskSettings
from peftlab.errors import ConfigError, DataError
from peftlab.loading import ModelSource
from peftlab.metric import digest_examples
from peftlab.streams import permutation
from peftlab.task import Example, choose
from peftlab.task_data import load_splits


@dataclass(frozen=True, slots=True)
class Lesson:
    """One task of a sequence.

    Attributes:
        label: What it is called.
        settings: The task and its data, as a run's config has them.
        task: The task's module.
        train_rows: Rows to train on.
        validation_rows: Rows whose loss is logged, and chooses a learning rate.
        test_examples: Examples that are scored.
        notes: What a person should know of its data.
    """

    label: str
    settings: TaskSettings
    task: ModuleType
    train_rows: tuple[Row, ...]
    validation_rows: tuple[Row, ...]
    test_examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """A text that is the same for the same prompt, rows and examples in the same order, and for no others."""
        rows = [[r.id, r.input_ids, r.labels] for r in (*self.train_rows, *self.validation_rows)]
        told = [self.task.PROMPT, rows, digest_examples(self.test_examples)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def load_lessons(
    tasks: Mapping[str, TaskSettings],
    source: ModelSource,
    *,
    seed: int,
    validation_rows: int,
    eval_samples: int | None,
) -> list[Lesson]:
    """Read the tasks of a sequence.

    Args:
        tasks: Label to task, in the order of learning.
        source: The base's tokenizer, config and head.
        seed: Seeds which rows are trained on and which examples are asked.
        validation_rows: Most rows of the validation loss.
        eval_samples: Test examples of each task; None is all.

    Returns:
        The lessons, in the same order.

    Raises:
        ConfigError: There are fewer than two tasks, the base does not write, or rows are longer than its positions.
        DataError: A task's data are not there, it has classes alone, or no row of it fits.
    """
    if len(tasks) < 2:
        raise ConfigError(f"learning in sequence takes two tasks or more, got {', '.join(tasks) or 'none'}")
    head = source.head
    if head == "classification":
        raise ConfigError(
            "a classifier's head belongs to one task; take a base that writes: causal or seq2seq"
        )
    lessons = []
    for label, settings in tasks.items():
        task = TASKS.load(settings.name)
        splits = load_splits(settings, seed=seed).for_head(head)
        if not splits.test or not splits.test[0].references:
            raise DataError(f"{label}: the task '{settings.name}' has no answers as texts in its test split")
        builder = RowBuilder(source.tokenizer, prompt=task.PROMPT, head=head, max_length=settings.max_length)
        order = choose(splits.train, len(splits.train), seed=seed)
        train, count = builder.build(order, limit=settings.num_samples)
        held_out, _ = builder.build(
            choose(splits.validation, len(splits.validation), seed=seed), limit=validation_rows
        )
        for split, rows in (("train", train), ("validation", held_out)):
            if not rows:
                raise DataError(
                    f"{label}: no {split} row fits {settings.max_length} tokens; raise max_length or check the data"
                )
        check_positions(source.config, [*train, *held_out], label)
        cut = [f"{label}: {count.truncated:,} of {count.kept:,} training rows cut"] if count.truncated else []
        notes = (*(f"{label}: {note}" for note in splits.notes), *cut)
        test = choose(splits.test, eval_samples, seed=seed)
        lessons.append(Lesson(label, settings, task, tuple(train), tuple(held_out), tuple(test), notes))
    return lessons


def check_positions(config: Any, rows: Sequence[Row], label: str) -> None:
    """Refuse rows that are longer than the base's positions.

    Args:
        config: The base's config of transformers.
        rows: The rows.
        label: Whose they are.

    Raises:
        ConfigError: One is.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.input_ids) for row in rows)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"{label}: rows have up to {longest} tokens but the base has {positions} positions; set max_length to"
            f" {positions} or less"
        )


def mix_in(
    new: Sequence[Row], old: Sequence[Sequence[Row]], *, share: float, seed: int
) -> tuple[list[Row], int]:
    """The rows of a task with some of earlier tasks among them.

    A step draws from all rows alike, so of its rows the share is old, in the mean; the task's own rows are seen the less
    often, since the number of steps stays.

    Args:
        new: The task's rows.
        old: The rows of each earlier task.
        share: The share of old rows, in (0, 1); each earlier task has an equal part of it.
        seed: Seeds which old rows are taken.

    Returns:
        All rows, and how many are old.

    Raises:
        ConfigError: The share is out of its range.

    Example:
        >>> rows = [Row(str(n), [n], [n]) for n in range(12)]
        >>> mix_in(rows[:8], [rows[8:]], share=0.2, seed=1)[1]
        2
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of old rows must lie between 0 and 1, both excluded; got {share}")
    wanted = round(share / (1 - share) * len(new))
    chosen: list[Row] = []
    for place, rows in enumerate(old):
        part = wanted * (place + 1) // len(old) - wanted * place // len(old)
        order = permutation(len(rows), seed, "replay", place, len(old))
        chosen += [rows[order[i % len(rows)]] for i in range(part)]  # few rows are taken again
    return [*new, *chosen], len(chosen)
