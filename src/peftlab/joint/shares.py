"""Which part of a joint batch belongs to which run: batches of several runs as one, and its tensors taken apart again.

Padded batches lie one behind the other along their rows, each run's own width is remembered: what a run is given back has
the shape that it has in a run alone, so that its random draws are the same. Packed batches lie one behind the other along
their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from peftlab.batches import IGNORED
from peftlab.errors import ModelError

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shares:
    """Which part of a joint batch belongs to which run.

    Attributes:
        names: The runs, in their order.
        rows: Rows of each run.
        widths: For each axis of tokens, the joint width to the width of each run: padded batches, and attention of packed
            ones.
        tokens: Tokens of each run in a packed batch; () where the batch is padded.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    widths: Mapping[int, tuple[int, ...]]
    tokens: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether all is one run's."""
        return len(self.names) == 1

    def split(self, tensor: torch.Tensor, *, axes: tuple[int, ...] = (1,)) -> list[torch.Tensor]:
        """The part of each run, in the shape that it has in a run alone.

        Args:
            tensor: (rows, width, ...), (rows, features), (rows * width, features), or packed (1, tokens, ...) or
                (tokens, features).
            axes: Which axes may be cut to the run's own width.

        Returns:
            One tensor for each run.

        Raises:
            ModelError: The rows cannot be told apart in this shape.
        """
        if self.is_whole:
            return [tensor]
        if self.tokens and tensor.shape[:2] == (1, sum(self.tokens)):
            return list(_parts(tensor, self.tokens, dim=1))
        if self.tokens and tensor.dim() == 2 and len(tensor) == sum(self.tokens):
            return list(_parts(tensor, self.tokens))
        if len(tensor) == sum(self.rows):
            pieces = _parts(tensor, self.rows)
            return [self._cut(piece, number, axes) for number, piece in enumerate(pieces)]
        width = self._flat_width(tensor)
        beside = _parts(tensor.reshape(sum(self.rows), width, -1), self.rows)
        return [piece[:, : self.widths[width][i]].flatten(0, 1) for i, piece in enumerate(beside)]

    def owners(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """The number of the run that each row or token belongs to.

        Args:
            shape: Of a tensor of the whole batch, as for `split`, without its features.
            device: Where.

        Returns:
            Numbers in `names`, of a shape that is broadcast to `shape`.

        Raises:
            ModelError: The rows cannot be told apart in this shape.
        """
        numbers = torch.arange(len(self.names), device=device)
        if self.tokens and shape == (1, sum(self.tokens)):
            return numbers.repeat_interleave(torch.tensor(self.tokens, device=device)).unsqueeze(0)
        if self.tokens and shape == (sum(self.tokens),):
            return numbers.repeat_interleave(torch.tensor(self.tokens, device=device))
        owners = numbers.repeat_interleave(torch.tensor(self.rows, device=device))
        if shape[0] == sum(self.rows):
            return owners.view(-1, *[1] * (len(shape) - 1))
        return owners.repeat_interleave(self._flat_width(torch.empty(*shape, 1, device="meta")))

    def merge(
        self, pieces: Sequence[torch.Tensor], like: torch.Tensor, *, axes: tuple[int, ...] = (1,)
    ) -> torch.Tensor:
        """The parts of all runs as one tensor.

        Args:
            pieces: As `split` gave them, with other features.
            like: A tensor of the whole batch.
            axes: As for `split`.

        Returns:
            As `like`; zeros beyond a run's own width.
        """
        if self.is_whole:
            return pieces[0]
        if self.tokens and like.shape[:2] == (1, sum(self.tokens)):
            return torch.cat(list(pieces), dim=1)
        if self.tokens and like.dim() == 2 and len(like) == sum(self.tokens):
            return torch.cat(list(pieces))
        if len(like) == sum(self.rows):
            return torch.cat([_padded(piece, like.shape, axes) for piece in pieces])
        width = self._flat_width(like)
        beside = [
            F.pad(piece.reshape(rows, -1, piece.shape[-1]), (0, 0, 0, width - own))
            for piece, rows, own in zip(pieces, self.rows, self.widths[width], strict=True)
        ]
        return torch.cat(beside).flatten(0, 1)

    def _cut(self, piece: torch.Tensor, number: int, axes: tuple[int, ...]) -> torch.Tensor:
        """A run's rows without the columns that only wider runs need."""
        if piece.dim() < 3 and axes == (1,):
            return piece
        for axis in axes:
            widths = self.widths.get(piece.shape[axis])
            if widths is None:
                raise ModelError(f"no tokens of a joint batch lie along axis {axis} of {tuple(piece.shape)}")
            piece = piece.narrow(axis, 0, widths[number])
        return piece

    def _flat_width(self, tensor: torch.Tensor) -> int:
        """The width that rows and columns were flattened from.

        Raises:
            ModelError: There is none.
        """
        for width in self.widths:
            if tensor.dim() == 2 and not self.tokens and len(tensor) == sum(self.rows) * width:
                return width
        raise ModelError(
            f"the rows of a joint batch of {sum(self.rows)} cannot be told apart in a tensor of shape {tuple(tensor.shape)}"
        )


def whole_share(name: str) -> Shares:
    """A batch that is one run's alone.

    Args:
        name: The run.
    """
    return Shares((name,), (0,), {})


def join_batches(batches: Mapping[str, Batch], *, pad_id: int) -> tuple[Batch, Shares]:
    """The batches of several runs as one.

    Args:
        batches: Run to its batch, from a collator: all padded or all packed.
        pad_id: The token that fills padded batches.

    Returns:
        The joint batch, and which part of it is whose.
    """
    given = list(batches.values())
    if "position_ids" in given[0]:
        joint = {key: torch.cat([batch[key] for batch in given], dim=1) for key in given[0]}
        lengths = [_row_lengths(batch["position_ids"][0]) for batch in given]
        longest = [max(found) for found in lengths]
        tokens = tuple(sum(found) for found in lengths)
        rows = tuple(len(found) for found in lengths)
        return joint, Shares(tuple(batches), rows, {max(longest): tuple(longest)}, tokens)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    own = {key: tuple(batch[key].shape[1] for batch in given) for key in given[0] if given[0][key].dim() > 1}
    widths = {key: max(found) for key, found in own.items()}
    if "labels" in own and own["labels"] != own["input_ids"] and widths["labels"] == widths["input_ids"]:
        longer = widths["input_ids"] + 1  # so that the two axes of an encoder-decoder have two widths
        widths |= {"input_ids": longer, "attention_mask": longer}
    joint = {
        key: torch.cat(
            [F.pad(batch[key], (0, widths[key] - batch[key].shape[1]), value=fill[key]) for batch in given]
            if key in own
            else [batch[key] for batch in given]
        )
        for key in given[0]
    }
    rows = tuple(len(batch["input_ids"]) for batch in given)
    return joint, Shares(tuple(batches), rows, {widths[key]: found for key, found in own.items()})


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of a batch."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _row_lengths(position_ids: torch.Tensor) -> list[int]:
    """The lengths of packed rows, from positions (tokens,) that begin anew at each."""
    begins = (position_ids == 0).nonzero().flatten().tolist()
    return [end - begin for begin, end in zip(begins, [*begins[1:], len(position_ids)], strict=True)]


def _padded(piece: torch.Tensor, shape: torch.Size, axes: tuple[int, ...]) -> torch.Tensor:
    """A run's rows with zeros up to the joint width."""
    if piece.dim() < 3 and axes == (1,):
        return piece
    sizes = [0] * (2 * piece.dim())
    for axis in axes:
        sizes[2 * (piece.dim() - 1 - axis) + 1] = shape[axis] - piece.shape[axis]
    return F.pad(piece, sizes) if any(sizes) else piece


def _parts(tensor: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[torch.Tensor, ...]:
    """A tensor in pieces of the given sizes."""
    pieces: tuple[torch.Tensor, ...] = torch.split(tensor, list(sizes), dim=dim)
    return pieces
