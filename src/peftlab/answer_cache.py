"""Keys and values while answers are decoded: room for what comes, rows that leave without the others being copied.

transformers' own cache joins old and new at every token, and copies every row that stays when one leaves. Here a token is
written into room kept for it, and a row that stays moves only where it takes the place of one that has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

SPARE = 32
"""Tokens that room is kept for where nobody says how many will come."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, with room for the next tokens: nothing is copied but what is new.

    Args:
        spare: How many further tokens room is kept for.
    """

    def __init__(self, spare: int = SPARE) -> None:
        super().__init__()
        self._spare = spare
        self._rooms: dict[str, torch.Tensor] = {}
        self.keys: Any
        self.values: Any

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values.

        Args:
            key_states: (batch, heads, new, head).
            value_states: (batch, heads, new, head).

        Returns:
            All keys and all values, (batch, heads, seq, head).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with some of the rows alone; one that keeps its place is not touched.

        Args:
            indices: The places in the batch so far, of those that stay, in their new order.
        """
        for name in ("keys", "values"):
            held, room = getattr(self, name), self._rooms.get(name)
            if room is None or room.data_ptr() != held.data_ptr():  # an opening, held once for all rows
                setattr(self, name, held[indices])
                continue
            moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
            held[moved] = held[indices[moved]]
            setattr(self, name, held[: len(indices)])
            self._rooms[name] = room[: len(indices)]

    def put(self, part: RoomyLayer, rows: slice, num_rows: int, width: int, shared: int) -> None:
        """Take over what was computed for some of the rows, their ends at one place; what lies before them is 0.

        Args:
            part: Their keys and values.
            rows: Their places in the batch.
            num_rows: Rows of the batch.
            width: Tokens of the whole batch's widest row.
            shared: Tokens at the front that stand there for every row.
        """
        if not part.is_initialized:
            return  # a layer that reads what another one keeps
        for name in ("keys", "values"):
            new = getattr(part, name)
            if not self.is_initialized:
                self.lazy_initialization(new, new)
            if name not in self._rooms:
                self._rooms[name] = new.new_zeros(
                    (num_rows, new.shape[1], width + self._spare, new.shape[-1])
                )
            room, own = self._rooms[name], new.shape[-2] - shared
            room[rows, :, :shared] = new[..., :shared, :]
            room[rows, :, width - own : width] = new[..., shared:, :]
            setattr(self, name, room[..., :width, :])

    def _append(self, name: str, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """What is held with what is new behind it, in the same room where it fits."""
        length = held.shape[-2] if held.numel() else 0
        total, room = length + new.shape[-2], self._rooms.get(name)
        if room is None or room.data_ptr() != held.data_ptr() or room.shape[-2] < total:
            room = new.new_empty((*new.shape[:-2], total + self._spare, new.shape[-1]))
            if length:
                room[..., :length, :] = held
            self._rooms[name] = room
        room[..., length:total, :] = new
        return room[..., :total, :]


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """What all prompts begin with, computed once.

    Attributes:
        num_tokens: Its length.
        keys_and_values: Of each layer, (1, heads, num_tokens, head).
    """

    num_tokens: int = 0
    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


NO_OPENING = Opening()
"""Where nothing is shared."""


def new_cache(inner: Any, spare: int = SPARE) -> DynamicCache:
    """The cache of transformers for a model, with room in the layers that keep everything.

    Args:
        inner: A model of transformers.
        spare: How many tokens behind the prompts room is kept for.

    Returns:
        The cache, empty.

    Raises:
        ValueError: The model's config names no layers.
    """
    cache = DynamicCache(config=inner.config)
    cache.layers = [RoomyLayer(spare) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if not cache.layers:
        raise ValueError("its config names no layers")
    return cache


def keeps_everything(cache: DynamicCache) -> bool:
    """Whether every layer keeps all keys and values, none only those of a window."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)


def fill(cache: DynamicCache, opening: Opening, num_rows: int) -> DynamicCache:
    """Put an opening before every row.

    Args:
        cache: An empty cache.
        opening: What all prompts begin with.
        num_rows: How many rows will be read.

    Returns:
        The same cache.
    """
    for layer, (keys, values) in zip(cache.layers, opening.keys_and_values, strict=False):
        layer.lazy_initialization(keys, values)
        layer.keys = keys.expand(num_rows, -1, -1, -1)
        layer.values = values.expand(num_rows, -1, -1, -1)
    return cache


def keep_rows(cache: DynamicCache, processors: Sequence[Any], left: torch.Tensor) -> None:
    """Take rows out of a cache and of what draws their tokens.

    Args:
        cache: The cache.
        processors: transformers' logits processors; one with a `keep_rows` is told which rows are left.
        left: Places of the rows that stay, in their new order.
    """
    for layer in cache.layers:
        if layer.get_seq_length() > 0:
            layer.batch_select_indices(left)
    for process in processors:
        if hasattr(process, "keep_rows"):
            process.keep_rows(left.tolist())
