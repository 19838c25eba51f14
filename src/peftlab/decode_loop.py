"""Decoding of decoder-only models token by token, rows that have ended leaving the batch.

`generate` of transformers carries a row on until the longest answer of its batch has ended, and copies all keys and
values at every token. Here what has ended is taken out, keys and values are written into room kept for them, and an opening
that all prompts share is computed once. It is used where a trial beside `generate` shows the same logits (`generation`), and
stands on the public cache of transformers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

FEWEST_SHARED = 8
"""Tokens of a shared opening from which computing it once is worth its own pass."""
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be called as it is here."""
_SPARE = 32
_PASSING = 24
_LEAVE_TOGETHER = 8


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, with room for the next tokens: nothing is copied but what is new."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
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

    def _append(self, name: str, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """What is held with what is new behind it, in the same room where it fits."""
        length = held.shape[-2] if held.numel() else 0
        total, room = length + new.shape[-2], self._rooms.get(name)
        if room is None or room.data_ptr() != held.data_ptr() or room.shape[-2] < total:
            room = new.new_empty((*new.shape[:-2], total + _SPARE, new.shape[-1]))
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


def why_not(model: Any) -> str | None:
    """Why a model cannot be decoded here, as far as its class says it.

    Args:
        model: A generating model, bare or wrapped by peft.

    Returns:
        The reason; None where a trial may be made.
    """
    inner = _inner(model)
    missing = {"attention_mask", "past_key_values", "use_cache"} - set(
        inspect.signature(inner.forward).parameters
    )
    if missing:
        return f"{type(inner).__name__} does not take {', '.join(sorted(missing))}"
    try:
        kinds = {type(layer) for layer in _new_cache(inner).layers}
    except FAILURES as error:
        return f"transformers has no cache for {type(inner).__name__}: {error}"
    other = kinds - {RoomyLayer, DynamicSlidingWindowLayer}
    if other:
        return f"{type(inner).__name__} keeps more than keys and values: {', '.join(sorted(k.__name__ for k in other))}"
    return None


def shared_opening(model: Any, prompts: Sequence[list[int]]) -> Opening:
    """Compute what all prompts begin with.

    Args:
        model: A model that `why_not` has nothing against.
        prompts: Token rows.

    Returns:
        Its keys and values; `NO_OPENING` where fewer than `FEWEST_SHARED` tokens are shared, or where layers see a window
        alone, which pads behind the opening would shift.
    """
    first, last = min(prompts), max(prompts)  # in the order of words, so what these two share all share
    common = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )
    shared = min(common, min(len(row) for row in prompts) - 1)
    cache = _new_cache(_inner(model))
    if shared < FEWEST_SHARED or any(type(layer) is not RoomyLayer for layer in cache.layers):
        return NO_OPENING
    ids = torch.tensor([prompts[0][:shared]], device=next(model.parameters()).device)
    with torch.inference_mode(), _whole_head_rows(model):
        _forward(model, ids, torch.ones_like(ids), cache)
    return Opening(shared, [(layer.keys, layer.values) for layer in cache.layers])


def decode(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    max_new_tokens: int,
    end_id: int | None,
    pad_id: int,
    processors: Sequence[Any] = (),
    ended: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    opening: Opening = NO_OPENING,
) -> list[list[int]]:
    """Answers of one batch, the likeliest token at each place.

    Args:
        model: A model in evaluation mode.
        ids: Prompts without what they share, padded on the left, shape (batch, seq).
        mask: 1 for tokens, 0 for pads, shape (batch, seq).
        max_new_tokens: Longest answer.
        end_id: The token that ends an answer.
        pad_id: What is written behind an answer that has ended while its row is still in the batch.
        processors: transformers' logits processors; one with a `keep_rows` is told which rows are left.
        ended: Says which rows have ended, given all tokens of the batch but those shared.
        opening: What all prompts begin with.

    Returns:
        For each row the tokens of its answer, its end included.
    """
    width, shared = ids.shape[1], opening.num_tokens
    cache = _filled_cache(model, opening, len(ids))
    mask = torch.cat([mask.new_ones(len(mask), shared), mask], dim=1)
    rows = torch.arange(len(ids), device=ids.device)
    over, lengths = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    answers: list[list[int]] = [[] for _ in rows]
    new = ids
    with torch.inference_mode(), _whole_head_rows(model):
        for number in range(1, max_new_tokens + 1):
            logits = _forward(model, new, mask, cache)
            for process in processors:
                logits = process(ids, logits)
            token = logits.argmax(dim=-1).masked_fill(over, pad_id)
            ids = torch.cat([ids, token[:, None]], dim=1)
            lengths += (~over).long()
            over = over | (token == end_id) if end_id is not None else over
            over = over | ended(ids, None) if ended is not None else over
            num_over = len(over) if number == max_new_tokens else int(over.sum())
            last = num_over == len(over)
            if last or num_over * _LEAVE_TOGETHER >= len(over):
                leaving = torch.ones_like(over) if last else over
                for row, length, tokens in zip(
                    rows[leaving].tolist(), lengths[leaving].tolist(), ids[leaving].tolist(), strict=True
                ):
                    answers[row] = tokens[width : width + length]
                if last:
                    break
                left = (~over).nonzero().squeeze(1)
                rows, lengths, ids, mask, token, over = (
                    kept[left] for kept in (rows, lengths, ids, mask, token, over)
                )
                _keep_rows(cache, processors, left)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            new = token[:, None]
    return answers


def first_logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, opening: Opening = NO_OPENING
) -> torch.Tensor:
    """The logits of the first row's first two tokens; the other rows leave after their first.

    Args:
        model: A model in evaluation mode.
        ids: As for `decode`.
        mask: As for `decode`.
        opening: What all prompts begin with.

    Returns:
        Shape (2 * vocab,), in float32.
    """
    seen: list[torch.Tensor] = []

    def look(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits[0])
        return logits

    def others(rows: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.arange(len(rows), device=rows.device) > 0

    decode(
        model, ids, mask, max_new_tokens=2, end_id=None, pad_id=0, processors=[look], ended=others, opening=opening
    )  # fmt: skip
    return torch.cat(seen)


def bytes_per_token(model: Any) -> int:
    """What one token takes while a batch is read: its keys and values, and a layer's passing tensors.

    Args:
        model: A model that `why_not` has nothing against.

    Returns:
        Bytes, measured on one token; the logits too where a model computes them for every token.
    """
    inner = _inner(model)
    cache, device = _new_cache(inner), next(model.parameters()).device
    with torch.inference_mode():
        ids = torch.ones(1, 1, dtype=torch.long, device=device)
        logits = _forward(model, ids, torch.ones_like(ids), cache)
    held = [
        t[..., :1, :] for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)
    ]
    passing = _PASSING * getattr(inner.config.get_text_config(), "hidden_size", 0) * held[0].element_size()
    keeps_all = "logits_to_keep" not in inspect.signature(inner.forward).parameters
    return int(sum(t.numel() * t.element_size() for t in held) + passing + keeps_all * logits.numel() * 4)


def _keep_rows(cache: DynamicCache, processors: Sequence[Any], left: torch.Tensor) -> None:
    """Take rows out of a cache and of what draws their tokens."""
    for layer in cache.layers:
        layer.batch_select_indices(left)
    for process in processors:
        if hasattr(process, "keep_rows"):
            process.keep_rows(left.tolist())


def _forward(model: Any, new: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits behind the last token in float32, as transformers' own loop takes them, shape (batch, vocab)."""
    taken = inspect.signature(_inner(model).forward).parameters
    more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    if "position_ids" in taken:
        positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
        more["position_ids"] = positions[:, -new.shape[1] :]
    output = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
    return output.logits[:, -1].to(copy=True, dtype=torch.float32)  # type: ignore[no-any-return]


def _new_cache(inner: Any) -> DynamicCache:
    """The cache of transformers for a model, with room in the layers that keep everything."""
    cache = DynamicCache(config=inner.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if not cache.layers:
        raise ValueError("its config names no layers")
    return cache


def _filled_cache(model: Any, opening: Opening, num_rows: int) -> DynamicCache:
    """A new cache that holds the opening for every row."""
    cache = _new_cache(_inner(model))
    for layer, (keys, values) in zip(cache.layers, opening.keys_and_values, strict=False):
        layer.lazy_initialization(keys, values)
        layer.keys = keys.expand(num_rows, -1, -1, -1)
        layer.values = values.expand(num_rows, -1, -1, -1)
    return cache


def _inner(model: Any) -> Any:
    """The model of transformers itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _whole_head_rows(model: Any) -> Iterator[None]:
    """A context in which the head reads rows that lie one behind the other.

    The last token's row of each prompt is a slice; with a frozen head torch would then take one product for each prompt, the
    head's weight copied for every one.

    Args:
        model: A generating model, bare or wrapped by peft.

    Yields:
        Nothing.
    """
    head = _inner(model).get_output_embeddings()
    if head is None:
        yield
        return

    def whole(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in given)

    handle = head.register_forward_pre_hook(whole)
    try:
        yield
    finally:
        handle.remove()
