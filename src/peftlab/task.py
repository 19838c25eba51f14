"""What a task is: examples, one prompt template, and the metrics that score it.

A leaf in `tasks/` is a module with:

- `PROMPT`: the template, a format string with `{source}`; used for training and for evaluation (law 5);
- `METRICS`: names of the metrics that score it, the first one is the headline;
- `load(data_dir, *, seed) -> Splits`: the examples; label tasks name their classes in `Splits.labels`. Where their
  examples hold references too, a model that can write is trained on these, any other as a classifier.

It may also have:

- `Settings`: its own settings (`task.settings`), which `load` then takes as `settings=`;
- `MAX_NEW_TOKENS`: the longest answer in tokens, where the config says nothing;
- `NUM_EVALUATED`: how many examples `peftlab evaluate` scores a model on, where nobody says it;
- `HUB_FILES`, `HUB_COLUMNS`, `from_hub`: the file that it reads each split from, the hub's column names to its own, and
  where a rename is not enough a function from the file and the hub's rows to the rows of all files made of them: then
  `task.hub` reads it by hub name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from peftlab.streams import permutation

CHAT_PROMPT = "{messages}"
"""The template of tasks whose sources are conversations: the tokenizer's own chat template takes its place."""


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to do, with all its accepted answers.

    Training makes one row of each (source, reference) pair; evaluation asks once per example and scores against all
    references.

    Attributes:
        id: Unique within the task, stable between loads, e.g. "train-17".
        source: What the model is given, before the prompt template.
        references: Accepted answers, at least one for text tasks; empty for label tasks, unless the label is also asked
            for as a text.
        values: Strings that a right answer holds verbatim (names, numbers); empty where the task has none.
        label: Class index for label tasks, else None.
        facts: What a metric needs to know and no model is told, as pairs of name and text, e.g. the database in which
            queries are executed; empty where there is nothing.
    """

    id: str
    source: str
    references: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    label: int | None = None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts of a task's data; no source is shared between them.

    Attributes:
        train: Examples to train on.
        validation: Examples whose loss chooses the best checkpoint.
        test: Examples that are scored, before and after.
        files: The files the examples came from (empty for generated data); their checksums go into the run folder.
        notes: What a person should know, e.g. "3 duplicate rows were kept".
        labels: Class names by index for label tasks; empty for tasks that generate text.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    files: Sequence[Path] = ()
    notes: Sequence[str] = ()
    labels: tuple[str, ...] = ()

    @property
    def as_texts(self) -> bool:
        """Whether a label task also gives its labels as texts, for models that write."""
        examples = next((part for part in (self.train, self.test) if part), ())
        return bool(self.labels and examples and examples[0].references)

    def for_head(self, head: str) -> Splits:
        """The splits as a model's head uses them.

        Args:
            head: "causal", "seq2seq" or "classification".

        Returns:
            The same splits; of a task that gives classes and texts, classes alone for a classifier and texts alone for
            a model that writes.
        """
        if not self.as_texts:
            return self
        if head != "classification":
            return replace(self, labels=())
        parts = (self.train, self.validation, self.test)
        train, validation, test = ([replace(e, references=()) for e in part] for part in parts)
        return replace(self, train=train, validation=validation, test=test)


@runtime_checkable
class Task(Protocol):
    """A leaf of `tasks/` (a module satisfies this)."""

    PROMPT: str
    METRICS: tuple[str, ...]

    def load(self, data_dir: Path | None, *, seed: int) -> Splits:
        """Read or generate the examples.

        Args:
            data_dir: The folder that holds the data set's own files; None for generated data.
            seed: Seeds whatever is drawn at random.

        Returns:
            The splits, the same for the same arguments.

        Raises:
            DataError: A file is missing, malformed or empty; names file and line.
        """
        ...


def choose(examples: Sequence[Example], limit: int | None, *, seed: int) -> list[Example]:
    """All examples, or a seeded choice of some.

    Args:
        examples: A split.
        limit: How many; None takes all, in their order.
        seed: The run's seed.

    Returns:
        The examples; the same for the same arguments.
    """
    if limit is None:
        return list(examples)
    return [examples[i] for i in permutation(len(examples), seed, "subset")[:limit]]


def render_prompt(template: str, source: str) -> str:
    r"""The prompt for one source text (law 5: training and evaluation both call this).

    Args:
        template: A task's `PROMPT`.
        source: An example's source.

    Returns:
        The template with `{source}` replaced; braces in the source are left alone.

    Example:
        >>> render_prompt("Say: {source}\n", "a {b}")
        'Say: a {b}\n'
    """
    if template == CHAT_PROMPT:  # the tokenizer writes the conversation
        return source
    head, _, tail = template.partition("{source}")
    return f"{head}{source}{tail}"
