"""S1's functions that make training rows of a data set, kept under their names.

They are a face: data come from the tasks, rows from `RowBuilder`: the prompt template of training is that of scoring,
the end of a text is learnt, the loss is on the answer alone, a source that is too long is cut and an answer never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.batches import Collator, Row, RowBuilder, RowCount
from peftlab.catalog import TASKS
from peftlab.errors import ConfigError, DataError
from peftlab.experiment_config import DataConfig, ExperimentConfig
from peftlab.method import Head
from peftlab.task import choose
from peftlab.task_data import load_splits

__all__ = ["get_data_collator", "load_and_preprocess_dataset"]


class PreparedRows(list[dict[str, Any]]):
    """Rows of one split as a transformers `Trainer` takes them: "input_ids", "attention_mask", "labels".

    Attributes:
        row_count: What was read, cut and dropped.
    """

    row_count: RowCount


def load_and_preprocess_dataset(
    config: DataConfig,
    tokenizer: Any,
    *,
    head: Head = "causal",
    splits: Sequence[str] = ("train", "validation"),
    seed: int = 42,
) -> dict[str, PreparedRows]:
    """Read a data set and turn it into rows of tokens.

    Args:
        config: The data set, its folder, the longest row in tokens, and how many training rows (0 for all).
        tokenizer: A transformers tokenizer.
        head: What the model ends in: causal, seq2seq or classification.
        splits: Which of train, validation and test.
        seed: Seeds the choice of training rows.

    Returns:
        Rows by split, not padded: one for each example and reference. Labels are -100 on a causal model's prompt.

    Raises:
        ConfigError: A split or a setting is unknown.
        DataError: The data are not there or malformed, or no row of a split fits.
    """
    settings = ExperimentConfig(data=config).to_run_config().task
    unknown = [split for split in splits if split not in ("train", "validation", "test")]
    if unknown:
        raise ConfigError(f"there is no split '{unknown[0]}'; there is: train, validation, test")
    data = load_splits(settings, seed=seed)
    if head == "classification" and not data.labels:
        raise DataError(
            f"the task '{settings.name}' has no classes; its answers are texts (head: causal or seq2seq)"
        )
    data = data.for_head(head)
    builder = RowBuilder(
        tokenizer, prompt=TASKS.load(settings.name).PROMPT, head=head, max_length=settings.max_length
    )
    prepared = {}
    for split in splits:
        limit = settings.num_samples if split == "train" else None
        examples = getattr(data, split)
        rows, count = builder.build(
            choose(examples, None if limit is None else len(examples), seed=seed), limit=limit
        )
        if not rows:
            why = "; ".join(f"{reason}: {n}" for reason, n in count.dropped.items()) or "the split is empty"
            raise DataError(f"no {split} row is left ({why}); raise max_length or check the data")
        prepared[split] = PreparedRows(_features(row, head) for row in rows)
        prepared[split].row_count = count
    return prepared


def _features(row: Row, head: Head) -> dict[str, Any]:
    """A row under transformers' names."""
    labels = row.labels[0] if head == "classification" else row.labels
    return {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": labels}


class DataCollator:
    """Pads rows to the longest of a batch, as a transformers `Trainer` calls it.

    Args:
        pad_id: Token that fills; it is masked by position.
        head: What the model ends in.
    """

    def __init__(self, pad_id: int, head: Head) -> None:
        self._collator = Collator(pad_id, head)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Args:
            features: Rows of `load_and_preprocess_dataset`.

        Returns:
            input_ids and attention_mask (batch, seq); labels (batch, seq) or, for classification, (batch,).
        """
        labels = [row["labels"] if isinstance(row["labels"], list) else [row["labels"]] for row in features]
        rows = [Row("", list(row["input_ids"]), own) for row, own in zip(features, labels, strict=True)]
        return dict(self._collator(rows))


def get_data_collator(tokenizer: Any, *, head: Head = "causal") -> DataCollator:
    """What pads the rows of `load_and_preprocess_dataset` to batches.

    Args:
        tokenizer: The tokenizer that made them.
        head: What the model ends in: causal, seq2seq or classification.

    Returns:
        The collator.

    Raises:
        DataError: The tokenizer has neither a pad token nor an end of text.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise DataError(
            "the tokenizer has no pad token and no end of text; give it one: tokenizer.pad_token = ..."
        )
    return DataCollator(pad, head)
