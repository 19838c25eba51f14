"""Rows of a padded batch in groups of like length: the same terms in the loss, fewer pads.

A pass over a group costs what its tokens cost, pads included, and as much as some tokens more, whatever it holds.
`Grouping` divides a batch so that the sum is least. How depends on the lengths of the batch's rows alone: a run that goes
on divides as the run did that was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftlab.batches import IGNORED, Row
from peftlab.method import Head

PASS_TOKENS = 96
"""What a pass costs beside its tokens, in tokens. Measured forwards and backwards on two cores: a Bert of 12 layers and 768
features 40 to 60 in float32 and 20 to 40 in bfloat16, one of 4 and 256 about 75, one of 2 and 64 about 150."""


class Grouping:
    """Divides padded batches.

    Args:
        head: What the model ends in; only a decoder of its own has labels of another length than its input.
        pass_tokens: What a pass costs beside its tokens, in tokens.
    """

    def __init__(self, head: Head, *, pass_tokens: int = PASS_TOKENS) -> None:
        self.head, self.pass_tokens = head, pass_tokens

    def length(self, row: Row) -> tuple[int, int]:
        """Tokens that the model reads of a row, and those that its decoder reads.

        Args:
            row: The row.
        """
        return len(row.input_ids), len(row.labels) if self.head == "seq2seq" else 0

    def lengths(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """The length of each row.

        Args:
            rows: The rows.
        """
        return [self.length(row) for row in rows]

    def split(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """A batch as smaller ones, the longest rows first.

        Args:
            batch: From `Collator`, on any device: input_ids and attention_mask (batch, seq), labels; pads on the right.

        Returns:
            Batches of the same form, each as wide as its longest row; together they have each row once.
        """
        mask, labels = batch["attention_mask"], batch["labels"]
        read = mask.sum(dim=1).tolist()
        if self.head == "seq2seq":
            places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
            written = (places * (labels != IGNORED)).amax(dim=1).tolist()
        else:
            written = [0] * len(read)
        groups = divide(list(zip(read, written, strict=True)), pass_tokens=self.pass_tokens)
        if len(groups) == 1:
            return [batch]
        return [
            self._only(batch, group, max(read[i] for i in group), max(written[i] for i in group))
            for group in groups
        ]

    def _only(self, batch: dict[str, Any], group: list[int], read: int, written: int) -> dict[str, Any]:
        """Some rows of a batch, no wider than they need."""
        rows = torch.tensor(group, device=batch["input_ids"].device)
        ends = {
            "input_ids": read,
            "attention_mask": read,
            "labels": {"causal": read, "seq2seq": written, "classification": None}[self.head],
        }
        # some models view labels flat, so what is cut lies whole
        return {
            name: batch[name]
            .index_select(0, rows)[(slice(None), slice(end))[: batch[name].dim()]]
            .contiguous()
            for name, end in ends.items()
        }

    def cost(self, rows: Sequence[Row], batch_size: int) -> tuple[int, int]:
        """What passes over rows cost, in tokens.

        Args:
            rows: The rows, in the order of their batches.
            batch_size: Rows of one batch.

        Returns:
            As padded batches, and as divided ones.
        """
        padded = divided = 0
        for start in range(0, len(rows), batch_size):
            lengths = self.lengths(rows[start : start + batch_size])
            padded += _cost(lengths, self.pass_tokens)
            divided += sum(
                _cost([lengths[i] for i in group], self.pass_tokens)
                for group in divide(lengths, pass_tokens=self.pass_tokens)
            )
        return padded, divided


def divide(lengths: Sequence[tuple[int, int]], *, pass_tokens: int) -> list[list[int]]:
    """Rows in groups whose passes together cost least.

    The rows are sorted by length and cut. With cost(i, j) = pass_tokens + (j - i) * width(i, j), the least cost of the
    first j rows is C_j = min over i < j of C_i + cost(i, j).

    Args:
        lengths: Tokens read and tokens written of each row.
        pass_tokens: What a pass costs beside its tokens, in tokens.

    Returns:
        Groups of row numbers, the longest rows first; rows of one length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    least, begins = [0], [0]
    for end in range(1, len(order) + 1):
        found: tuple[int, int] | None = None
        read = written = 0
        for begin in range(end - 1, -1, -1):
            read, written = max(read, lengths[order[begin]][0]), max(written, lengths[order[begin]][1])
            whole = least[begin] + pass_tokens + (end - begin) * (read + written)
            if found is None or whole <= found[0]:  # of equal ones the fewest passes
                found = whole, begin
        assert found is not None
        least.append(found[0])
        begins.append(found[1])
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def _cost(lengths: Sequence[tuple[int, int]], pass_tokens: int) -> int:
    """What one padded pass over rows costs, in tokens."""
    read, written = max(pair[0] for pair in lengths), max(pair[1] for pair in lengths)
    return pass_tokens + len(lengths) * (read + written)
