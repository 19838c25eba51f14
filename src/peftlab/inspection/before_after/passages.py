"""What both sides read: rows of the run's own task, and general text that the task does not have.

General text comes from the person's file; else from peftlab: for the embedded base documents of its own corpus' generator,
drawn with another seed than it was trained on, for every other base plain English prose written for this purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peftlab.batches import IGNORED, Row, RowBuilder
from peftlab.catalog import TASKS
from peftlab.config import EMBEDDED_BASE, RunConfig
from peftlab.errors import DataError
from peftlab.inspection.reading_limits import ReadingLimits
from peftlab.inspection.text_batches import TextBatches, TextRow
from peftlab.inspection.tokenized import TokenizedText
from peftlab.method import Head
from peftlab.task_data import load_splits

MOST_TOKENS = 128
"""Tokens of a passage; the rest is cut."""
MOST_PASSAGES = 48
"""Passages of each kind."""
BATCH_TOKENS = 1024
"""Tokens of a batch, pads included, on each side."""
_MUCH_UNKNOWN = 0.2
"""Share of unknown tokens that is told."""
_GENERAL = Path(__file__).parents[2] / "assets" / "general_text"


@dataclass(frozen=True, slots=True)
class Passages:
    """Some passages of one kind.

    Attributes:
        name: "task", "given" or "general".
        told: Where they come from.
        rows: What is read.
        targets: What is to be said at each position of the stack that speaks (the next token, or the answer's), `IGNORED`
            where nothing is.
    """

    name: str
    told: str
    rows: tuple[TextRow, ...]
    targets: tuple[npt.NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Passages of like length, padded to the right.

    Attributes:
        numbers: Which passages, in their order in the rows.
        inputs: The model's arguments, each (batch, seq).
        width: Positions of what the stack reads, pads included.
        real: (batch, width), True where no pad.
        targets: (batch, width), `IGNORED` where nothing is to be said.
    """

    numbers: tuple[int, ...]
    inputs: Mapping[str, torch.Tensor]
    width: int
    real: torch.Tensor
    targets: torch.Tensor


class PassageReader:
    """Makes passages for one model and its tokenizer.

    Args:
        model: The tuned model: virtual tokens take positions from the text.
        tokenizer: Its tokenizer.
        head: What it ends in.
    """

    def __init__(self, model: Any, tokenizer: Any, head: Head) -> None:
        self.model, self.tokenizer, self.head = model, tokenizer, head
        positions = [n for n in ReadingLimits(model, tokenizer).positions if n is not None]
        self.max_length = min([MOST_TOKENS, *positions])

    def of_texts(self, name: str, told: str, texts: Sequence[str]) -> Passages:
        """Passages of plain texts; the decoder of an encoder-decoder reads the text that its encoder reads.

        Args:
            name: What they are called.
            told: Where they come from.
            texts: The texts.

        Returns:
            The passages; a causal model is to say every next token, the others nothing.

        Raises:
            DataError: A text has no tokens.
        """
        chosen = [texts[i] for i in _spread(len(texts), MOST_PASSAGES)]
        written = chosen if self.head == "seq2seq" else None
        batches = TextBatches(
            self.model, self.tokenizer, chosen, decoder_texts=written, max_length=self.max_length
        )
        rows = batches.read(0, len(chosen))
        told += self._unknown(rows)
        targets = [self._next_tokens(row.source.ids) for row in rows]
        if self.head == "seq2seq":
            targets = [np.full(len(row.read), IGNORED, np.int64) for row in rows]
        return Passages(name, told, tuple(rows), tuple(targets))

    def of_task(self, config: RunConfig) -> Passages:
        """Test rows of a run's own task, as its training saw such rows.

        Args:
            config: The run's config.

        Returns:
            The passages, with what the model is to say behind each prompt.

        Raises:
            DataError: The task's data cannot be read, or no row fits.
        """
        task = TASKS.load(config.task.name)
        splits = load_splits(config.task, seed=config.data_seed).for_head(self.head)
        builder = RowBuilder(self.tokenizer, prompt=task.PROMPT, head=self.head, max_length=self.max_length)
        examples = [splits.test[i] for i in _spread(len(splits.test), MOST_PASSAGES)]
        rows = [row for example in examples for row in builder.build([example], limit=1)[0]]
        if not rows:
            raise DataError(f"no test row of {config.task.name} fits {self.max_length} tokens")
        told = f"{len(rows)} test rows of {config.task.name}, prompt and first answer"
        return Passages("task", told, tuple(map(self._row, rows)), tuple(map(self._answer, rows)))

    def general(self, base: str, file: Path | None) -> Passages:
        """General text, held out from the task.

        Args:
            base: The base's name.
            file: One passage a line; None takes peftlab's own.

        Returns:
            The passages.

        Raises:
            DataError: The file cannot be read or holds nothing.
        """
        if file is not None:
            texts = read_general_text(file)
            return self.of_texts("general", f"{len(texts)} lines of {file.name}", texts)
        kept = _GENERAL / ("tiny_base.json" if base == EMBEDDED_BASE else "english.json")
        content = json.loads(kept.read_text(encoding="utf-8"))
        return self.of_texts("general", content["told"], content["texts"])

    def batches(self, passages: Passages, *, decoder: bool, padded: bool) -> Iterator[Batch]:
        """The passages, batch after batch.

        Args:
            passages: The passages.
            decoder: Whether the stack that is looked at is the decoder beside an encoder.
            padded: Whether passages of different lengths may share a batch.

        Yields:
            Batches.
        """
        rows = [row if decoder else TextRow(row.source) for row in passages.rows]
        source = self._source(rows, decoder=decoder)
        for picked in source.batches(rows, padded=padded):
            yield self._batch(source, passages, rows, picked, decoder=decoder)

    def one_batch(self, passages: Passages, picked: Sequence[int], *, decoder: bool, wider: int = 0) -> Batch:
        """Chosen passages in one batch.

        Args:
            passages: The passages.
            picked: Which of them.
            decoder: As for `batches`.
            wider: Pads beyond the longest.

        Returns:
            The batch.
        """
        rows = [row if decoder else TextRow(row.source) for row in passages.rows]
        return self._batch(
            self._source(rows, decoder=decoder), passages, rows, picked, decoder=decoder, wider=wider
        )

    def _batch(
        self,
        source: TextBatches,
        passages: Passages,
        rows: Sequence[TextRow],
        picked: Sequence[int],
        *,
        decoder: bool,
        wider: int = 0,
    ) -> Batch:
        """One batch."""
        chosen = [rows[i] for i in picked]
        longest = (max(row.lengths[0] for row in chosen), max(row.lengths[1] for row in chosen))
        widths = (longest[0] + wider, longest[1] + wider * decoder)
        inputs, width = source.inputs(chosen, device=torch.device("cpu"), widths=widths)
        real = inputs["decoder_attention_mask" if decoder else "attention_mask"].bool()
        targets = torch.full((len(chosen), width), IGNORED)
        if decoder or self.head == "causal":
            for row, number in enumerate(picked):
                wanted = passages.targets[number]
                targets[row, : len(wanted)] = torch.from_numpy(wanted)
        return Batch(tuple(picked), inputs, width, real, targets)

    def _source(self, rows: Sequence[TextRow], *, decoder: bool) -> TextBatches:
        """What pads rows for this model."""
        written = [row.read.ids.tolist() for row in rows] if decoder else None
        return TextBatches(
            self.model,
            self.tokenizer,
            [row.source.text or "-" for row in rows],
            decoder_texts=written,
            batch_tokens=BATCH_TOKENS,
        )

    def _row(self, row: Row) -> TextRow:
        """A training row as a row to be read."""
        source = _tokens(row.input_ids)
        if self.head != "seq2seq":
            return TextRow(source)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        labels = torch.tensor([row.labels])
        return TextRow(source, _tokens(base.prepare_decoder_input_ids_from_labels(labels=labels)[0].tolist()))

    def _answer(self, row: Row) -> npt.NDArray[np.int64]:
        """What is to be said at each position."""
        labels = np.array(row.labels, np.int64)
        if self.head == "causal":  # row t predicts token t + 1
            return np.concatenate([labels[1:], [IGNORED]])
        return labels if self.head == "seq2seq" else np.full(len(row.input_ids), IGNORED, np.int64)

    def _unknown(self, rows: Sequence[TextRow]) -> str:
        """A warning where the tokenizer does not know much of a text."""
        ids = np.concatenate([row.source.ids for row in rows])
        unknown = self.tokenizer.unk_token_id
        share = 0.0 if unknown is None else float(np.mean(ids == unknown))
        if share < _MUCH_UNKNOWN:
            return ""
        return (
            f"; {100 * share:.0f} % of its tokens are unknown to this tokenizer: other text would tell more"
        )

    def _next_tokens(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """The token behind each; nothing for a model that does not say next tokens."""
        if self.head != "causal":
            return np.full(len(ids), IGNORED, np.int64)
        return np.concatenate([ids[1:].astype(np.int64), [IGNORED]])


def read_general_text(file: Path) -> list[str]:
    """The passages of a person's file.

    Args:
        file: One passage a line; blank lines are passed over.

    Returns:
        The passages.

    Raises:
        DataError: It cannot be read, or has fewer than 2 passages.
    """
    try:
        lines = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"general text {file} cannot be read: {error}; give a text file, one passage a line"
        ) from error
    texts = [line for line in lines if line]
    if len(texts) < 2:
        raise DataError(
            f"general text {file} holds {len(texts)} passages: give 2 at least, one a line; 30 serve better"
        )
    return texts


def is_padding_harmless(
    sides: Any, reader: PassageReader, passages: Passages, stack: str, *, decoder: bool
) -> bool:
    """Whether pads leave the other tokens alone: tried on the shortest passage, padded to the longest.

    Args:
        sides: Both sides.
        reader: Makes batches.
        passages: The passages.
        stack: The stack that is looked at.
        decoder: Whether it is the decoder beside an encoder.

    Returns:
        Whether passages of different lengths may share a batch.
    """
    lengths = [len(row.read if decoder else row.source) for row in passages.rows]
    shortest = int(np.argmin(lengths))
    wider = max(lengths) - lengths[shortest]
    if not wider:
        return True
    alone, padded = (
        reader.one_batch(passages, [shortest], decoder=decoder, wider=more) for more in (0, wider)
    )
    one, two = (sides.hidden_states(stack, batch.inputs, batch.width)[1] for batch in (alone, padded))
    half = torch.finfo(next(iter(one.values())).dtype).eps > 1e-6
    return all(
        bool((two[i][:, : alone.width] - one[i]).abs().max() <= (3e-2 if half else 1e-3) * one[i].abs().max())
        for i in one
    )


def _tokens(ids: Sequence[int]) -> TokenizedText:
    """Ids as something that is read."""
    count = len(ids)
    return TokenizedText(
        "", np.array(ids, np.int32), np.zeros((count, 2), np.int32), np.zeros(count, np.bool_)
    )


def _spread(count: int, most: int) -> list[int]:
    """At most so many places of a list, evenly spread."""
    if count <= most:
        return list(range(count))
    places: list[int] = np.linspace(0, count - 1, most).round().astype(int).tolist()
    return places
