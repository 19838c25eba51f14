"""From examples to batches: rows of tokens, their order, and the pre-flight count of what was cut and dropped.

A row is prompt + answer + end of sequence; only the answer and the end of sequence carry labels. Truncation cuts the
source, never the answer. Pads are masked by the attention mask, never by token id, so an end-of-sequence token that
doubles as pad is still learnt. The order of rows is a pure function of the seed and the epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftlab.chat_prompts import ChatPrompts
from peftlab.errors import DataError
from peftlab.method import Head
from peftlab.streams import permutation
from peftlab.task import CHAT_PROMPT, Example, render_prompt
from peftlab.tokenizing import Tokenizing

IGNORED = -100
"""The label that the loss leaves out (torch's `ignore_index`)."""
_TOGETHER = 512
"""Examples whose texts are tokenised together."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training row.

    Attributes:
        id: The example's id and the reference's number, e.g. "train-17/2".
        input_ids: Tokens the model reads, shape (seq,).
        labels: For causal models one label per token, `IGNORED` on the prompt; for seq2seq the target's tokens; for
            classification one class index.
    """

    id: str
    input_ids: list[int]
    labels: list[int]


@dataclass(slots=True)
class RowCount:
    """What became of a split's rows.

    Attributes:
        read: Rows before anything was dropped.
        kept: Rows that are trained on.
        truncated: Kept rows whose source was cut.
        dropped: Reason to number of rows.
        tokens: Tokens in all kept rows.
        labelled_tokens: Tokens that carry a label.
        longest: Tokens of the longest kept row.
        unwritable: Answers that the tokenizer cannot write: read back from their tokens they are others.
        unwritable_example: One of these, with what is read back.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    labelled_tokens: int = 0
    longest: int = 0
    unwritable: int = 0
    unwritable_example: tuple[str, str] | None = None


class RowBuilder:
    """Turns examples into rows for one tokenizer and one kind of head.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The task's template.
        head: What the model ends in.
        max_length: Longest row in tokens.

    Raises:
        DataError: A generating model's tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, *, prompt: str, head: Head, max_length: int) -> None:
        if head != "classification" and tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so the model could never learn to stop"
            )
        self.tokenizer, self.prompt, self.head, self.max_length = tokenizer, prompt, head, max_length
        self.chat = ChatPrompts(tokenizer) if prompt == CHAT_PROMPT else None
        self._tokenizing = Tokenizing(tokenizer)

    def build(
        self, examples: Sequence[Example], *, limit: int | None = None, one_prompt: bool = False
    ) -> tuple[list[Row], RowCount]:
        """Rows of a split, one for each reference.

        Args:
            examples: The split.
            limit: Stop after so many kept rows; None keeps all.
            one_prompt: Whether a prompt is cut for the longest of its example's answers, so that all of them follow the
                same one.

        Returns:
            The rows and what became of them.
        """
        rows: list[Row] = []
        count = RowCount()
        for place, example in enumerate(examples):
            if place % _TOGETHER == 0 and self.chat is None:
                ahead = _TOGETHER if limit is None else min(_TOGETHER, limit - count.kept)
                self._read_ahead(examples[place : place + ahead])
            answers: Sequence[str | int] = example.references
            if self.head == "classification":
                answers = () if example.label is None else (example.label,)
            if not answers:
                count.read += 1
                count.dropped["no answer"] += 1
            room = self._room(example.source, answers) if one_prompt else None
            for number, answer in enumerate(answers):
                if limit is not None and count.kept >= limit:
                    return rows, count
                count.read += 1
                row = self._row(f"{example.id}/{number}", example.source, answer, count, room)
                if row is not None:
                    rows.append(row)
        return rows, count

    def _read_ahead(self, examples: Sequence[Example]) -> None:
        """Tokenise the texts of examples together."""
        prompts = [render_prompt(self.prompt, example.source) for example in examples]
        plain = [answer for example in examples for answer in example.references]
        if self.head == "causal":
            pairs = zip(prompts, examples, strict=True)
            plain = prompts + [f"{start} {text}" for start, one in pairs for text in one.references]
        self._tokenizing.read_ahead(prompts, plain if self.head != "classification" else [])

    def _room(self, source: str, answers: Sequence[str | int]) -> int | None:
        """Tokens left for a prompt by the longest of its answers; None where answers take none."""
        if self.head != "causal":
            return None
        lengths = [len(self._answer_after(source, answer)) for answer in answers if isinstance(answer, str)]
        return self.max_length - max(lengths, default=0)

    def _row(
        self, row_id: str, source: str, answer: str | int, count: RowCount, room: int | None = None
    ) -> Row | None:
        """One row, or None where it was dropped; counts it."""
        if isinstance(answer, int):
            prompt, cut = self._fit(source, self.max_length)
            labels, inputs = [answer], prompt
        elif self.head == "seq2seq":
            labels = self._answer_ids(answer, after="")
            if len(labels) > self.max_length:
                count.dropped[f"answer longer than {self.max_length} tokens"] += 1
                return None
            inputs, cut = self._fit(source, self.max_length)
        else:
            target = self._answer_after(source, answer)
            prompt, cut = self._fit(source, self.max_length - len(target) if room is None else room)
            inputs, labels = prompt + target, [IGNORED] * len(prompt) + target
        if not inputs or (self.head == "causal" and len(inputs) == len(labels) and not prompt and cut):
            count.dropped[f"prompt and answer do not fit {self.max_length} tokens"] += 1
            return None
        if not any(label != IGNORED for label in labels):
            count.dropped["no labelled token"] += 1
            return None
        if isinstance(answer, str):
            self._count_unwritable(answer, [label for label in labels if label != IGNORED], count)
        count.kept += 1
        count.truncated += cut
        count.tokens += len(inputs) + (len(labels) if self.head == "seq2seq" else 0)
        count.labelled_tokens += sum(label != IGNORED for label in labels)
        count.longest = max(count.longest, len(inputs), len(labels))
        return Row(row_id, inputs, labels)

    def _count_unwritable(self, answer: str, ids: list[int], count: RowCount) -> None:
        """Count an answer that is another one once it is read from its tokens, as a model's answers are."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if answer.strip() not in text:
            count.unwritable += 1
            count.unwritable_example = count.unwritable_example or (answer.strip(), text.strip())

    def prompt_ids(self, source: str, *, room: int) -> list[int]:
        """The tokens of a prompt, as training sees them (law 5).

        Args:
            source: The example's source.
            room: How many tokens there are for it.

        Returns:
            The tokens; the source's end is cut where they would not fit.

        Raises:
            DataError: Not even the template fits.
        """
        ids, _ = self._fit(source, room)
        if not ids:
            raise DataError(f"the prompt template alone does not fit {room} tokens")
        return ids

    def _fit(self, source: str, room: int) -> tuple[list[int], bool]:
        """Prompt tokens in `room`, cutting the source's end; ([], True) where the template alone is too long."""
        if self.chat is not None:
            return self.chat.fit(source, room)
        ids = self._prompt_ids(source)
        if len(ids) <= room:
            return ids, False
        low, high = 0, len(source)
        if room < 1 or len(self._prompt_ids("")) > room:
            return [], True
        while low < high:  # the longest beginning of the source that fits
            middle = (low + high + 1) // 2
            if len(self._prompt_ids(source[:middle])) <= room:
                low = middle
            else:
                high = middle - 1
        return self._prompt_ids(source[:low]), True

    def _prompt_ids(self, source: str) -> list[int]:
        """Tokens of the whole prompt, with the special tokens that open a text."""
        ids = self._tokenizing.ids(render_prompt(self.prompt, source), special=True)
        if self.head == "causal":  # some tokenizers close every text; here the answer follows
            while len(ids) > 1 and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
                ids = ids[:-1]
        return ids

    def _answer_after(self, source: str, answer: str) -> list[int]:
        """Tokens of an answer as they follow a source's prompt, closed by end of sequence."""
        if self.chat is not None:
            return self.chat.answer_ids(source, answer)
        return self._answer_ids(answer, after=render_prompt(self.prompt, source))

    def _answer_ids(self, answer: str, *, after: str) -> list[int]:
        """Tokens of an answer as they follow the prompt, closed by end of sequence.

        Args:
            answer: The answer.
            after: The prompt it follows; "" for a decoder of its own.
        """
        text = f" {answer}" if after else answer
        if (
            after
        ):  # tokenizers that mark word starts put a mark of their own before a text: learn it as it follows
            whole, start = (
                self._tokenizing.ids(after + text, special=False),
                self._tokenizing.ids(after, special=False),
            )
            if whole[: len(start)] == start:
                return [*whole[len(start) :], self.tokenizer.eos_token_id]
        ids = self._tokenizing.ids(text, special=False)
        return [*ids, self.tokenizer.eos_token_id]


class Collator:
    """Pads rows to the longest of the batch.

    Args:
        pad_id: Token that fills; never trained on and masked by position, so it may double as another token.
        head: What the model ends in.
    """

    def __init__(self, pad_id: int, head: Head) -> None:
        self.pad_id, self.head = pad_id, head

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            rows: The rows.

        Returns:
            input_ids and attention_mask (batch, seq); labels (batch, seq) or, for classification, (batch,).
        """
        width = max(len(row.input_ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
            mask[i, : len(row.input_ids)] = 1
        if self.head == "classification":
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.tensor([r.labels[0] for r in rows]),
            }
        label_width = max(len(row.labels) for row in rows)
        labels = torch.full((len(rows), label_width), IGNORED)
        for i, row in enumerate(rows):
            labels[i, : len(row.labels)] = torch.tensor(row.labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PackingCollator:
    """Puts the rows of a causal model one behind the other, without a pad; `isolation.Isolation` keeps them apart."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            rows: The rows.

        Returns:
            input_ids, labels and position_ids (1, tokens): positions begin anew at each row, and no row's first token
            carries a label, so that none is predicted from the row before.
        """
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row.input_ids]]),
            "labels": torch.tensor([[label for row in rows for label in (IGNORED, *row.labels[1:])]]),
            "position_ids": torch.tensor([[i for row in rows for i in range(len(row.input_ids))]]),
        }


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch that are no pads.

    Args:
        batch: From a collator.
    """
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


class EpochOrder:
    """The order of rows: every epoch a fresh permutation, every optimizer step equally many rows.

    An epoch's last step is filled up with the epoch's first rows. The order depends on the seed and the epoch alone, so
    two processes with half the batch see together what one process sees.

    Args:
        num_rows: Rows in the split.
        rows_per_step: Rows of one optimizer step, over all processes and accumulated batches.
        batch_size: Rows of one batch.
        seed: The run's seed.
        lengths: Of each row: the rows of a step then go into its batches by falling length; None leaves them mixed.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rows_per_step: int,
        batch_size: int,
        seed: int,
        lengths: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.num_rows, self.rows_per_step, self.batch_size = num_rows, rows_per_step, batch_size
        self.seed, self.lengths = seed, lengths
        self.epoch = 0
        self.drop_last = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.num_rows // self.rows_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iteration gives.

        Args:
            epoch: Counted from 0.
        """
        self.epoch = epoch

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of one optimizer step, over all processes.

        Args:
            step: Counted from 0 over the whole run.

        Returns:
            Row indices.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._epoch_rows(epoch)
        return order[within * self.rows_per_step : (within + 1) * self.rows_per_step]

    def __len__(self) -> int:
        return self.steps_per_epoch * self.rows_per_step // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = self._epoch_rows(self.epoch)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _epoch_rows(self, epoch: int) -> list[int]:
        """The epoch's permutation, filled up to whole steps."""
        order = permutation(self.num_rows, self.seed, "order", epoch)
        wanted = self.steps_per_epoch * self.rows_per_step
        while len(order) < wanted:
            order += order[: wanted - len(order)]
        if (lengths := self.lengths) is not None:
            steps = (
                order[start : start + self.rows_per_step] for start in range(0, wanted, self.rows_per_step)
            )
            order = [i for rows in steps for i in sorted(rows, key=lambda i: lengths[i], reverse=True)]
        return order
