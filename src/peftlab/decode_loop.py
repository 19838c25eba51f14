"""Decoding of decoder-only models token by token, rows that have ended leaving the batch.

`generate` of transformers carries a row on until the longest answer of its batch has ended, and copies all keys and
values at every token. Here what has ended is taken out, keys and values are written into room kept for them
(`answer_cache`), and an opening that all prompts share is computed once. A token's step reads all weights however few rows
there are, so many rows are decoded together; prompts have rows enough of their own, and are read a few at a time, which
keeps what passes between layers in the processor's caches. It is used where a trial beside `generate` shows the same
logits (`generation`), and stands on the public cache of transformers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from peftlab.answer_cache import (
    NO_OPENING,
    Opening,
    RoomyLayer,
    fill,
    keep_rows,
    keeps_everything,
    new_cache,
)

FEWEST_SHARED = 8
"""Tokens of a shared opening from which computing it once is worth its own pass."""
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be called as it is here."""
READ_TOGETHER = 1536
"""Most tokens of prompts that one pass reads on a CPU, pads included."""
_READ_TOGETHER_ON_A_CARD = 16384
_MOST_ROOM = 256
_PASSING = 24
_LEAVE_TOGETHER = 32


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
        kinds = {type(layer) for layer in new_cache(inner).layers}
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
    cache = new_cache(_inner(model))
    if shared < FEWEST_SHARED or not keeps_everything(cache):
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
    read_together: int | None = None,
    leaving: Callable[[dict[int, list[int]]], None] | None = None,
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
        read_together: Most tokens of prompts that one pass reads; what is fast on the device where None.
        leaving: Told the answers of the rows that leave, by number of the row.

    Returns:
        For each row the tokens of its answer, its end included.
    """
    width = ids.shape[1]
    mask = torch.cat([mask.new_ones(len(mask), opening.num_tokens), mask], dim=1)
    cache = new_cache(_inner(model), min(max_new_tokens, _MOST_ROOM))
    rows = torch.arange(len(ids), device=ids.device)
    over, lengths = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    answers: dict[int, list[int]] = {}
    with torch.inference_mode(), _whole_head_rows(model):
        logits = _read(model, ids, mask, cache, opening, read_together)
        for number in range(1, max_new_tokens + 1):
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
                gone = torch.ones_like(over) if last else over
                columns = (rows[gone].tolist(), lengths[gone].tolist(), ids[gone, width:].tolist())
                made = {row: tokens[:length] for row, length, tokens in zip(*columns, strict=True)}
                answers |= made
                if leaving is not None:
                    leaving(made)
                if last:
                    break
                left = _places(over)
                rows, lengths, ids, mask, token, over = (
                    kept[left] for kept in (rows, lengths, ids, mask, token, over)
                )
                keep_rows(cache, processors, left)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = _forward(model, token[:, None], mask, cache)
    return [answers[row] for row in range(len(answers))]


def _read(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, opening: Opening, most: int | None
) -> torch.Tensor:
    """Read prompts into a cache, a few rows at a time, each part without the pads that all its rows have.

    Returns:
        The logits behind each prompt, shape (batch, vocab).
    """
    shared, width = opening.num_tokens, ids.shape[1]
    few = ids.device.type == "cpu" or _keeps_all_logits(model)
    most = most or (READ_TOGETHER if few else _READ_TOGETHER_ON_A_CARD)
    parts = _parts(mask[:, shared:].sum(dim=1).tolist(), most)
    if len(parts) == 1 or not keeps_everything(cache):
        return _forward(model, ids, mask, fill(cache, opening, len(ids)))
    found = []
    for rows, longest in parts:
        first = width - longest
        part = fill(new_cache(_inner(model), 0), opening, rows.stop - rows.start)
        seen = torch.cat([mask[rows, :shared], mask[rows, shared + first :]], dim=1)
        found.append(_forward(model, ids[rows, first:], seen, part))
        for layer, new in zip(cache.layers, part.layers, strict=True):
            layer.put(new, rows, len(ids), shared + width, shared)
    return torch.cat(found)


def _parts(lengths: list[int], most: int) -> list[tuple[slice, int]]:
    """Neighbouring rows whose tokens, pads included, are at most so many, one row at least; and their longest."""
    found, start, longest = [], 0, 0
    for row, length in enumerate(lengths):
        wider = max(longest, length)
        if row > start and wider * (row + 1 - start) > most:
            found.append((slice(start, row), longest))
            start, wider = row, length
        longest = wider
    return [*found, (slice(start, len(lengths)), longest)]


def _places(over: torch.Tensor) -> torch.Tensor:
    """Places of the rows that go on, in an order in which as few as can be change theirs.

    Args:
        over: Which rows have ended, shape (batch,).

    Returns:
        Those at the front stay where they are; the places of those that have ended are taken by the last.
    """
    left = (~over).nonzero().squeeze(1)
    front = int((left < len(left)).sum())
    places = torch.arange(len(left), device=over.device)
    places[over[: len(left)]] = left[front:]
    return places


def first_logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, opening: Opening = NO_OPENING
) -> torch.Tensor:
    """The logits of the first row's first two tokens; each prompt is read by itself, the others leave after a token.

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
        seen.append(logits[-1])
        return logits

    def others(rows: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.arange(len(rows), device=rows.device) < len(rows) - 1

    rest = [*range(1, len(ids)), 0]  # what is looked at stands last: it moves when the others leave
    decode(
        model, ids[rest], mask[rest], max_new_tokens=2, end_id=None, pad_id=0, processors=[look], ended=others,
        opening=opening, read_together=1,
    )  # fmt: skip
    return torch.cat(seen)


def bytes_per_token(model: Any) -> int:
    """What one token takes while a batch is decoded: its keys and values, and a layer's passing tensors.

    Args:
        model: A model that `why_not` has nothing against.

    Returns:
        Bytes, measured on one token; keys and values alone where prompts are read a few at a time, else the logits too
        where a model computes them for every token.
    """
    inner = _inner(model)
    cache, device = new_cache(inner), next(model.parameters()).device
    with torch.inference_mode():
        ids = torch.ones(1, 1, dtype=torch.long, device=device)
        logits = _forward(model, ids, torch.ones_like(ids), cache)
    held = [
        t[..., :1, :] for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)
    ]
    if keeps_everything(cache):
        return sum(t.numel() * t.element_size() for t in held)
    passing = _PASSING * getattr(inner.config.get_text_config(), "hidden_size", 0) * held[0].element_size()
    keeps_all = _keeps_all_logits(model)
    return int(sum(t.numel() * t.element_size() for t in held) + passing + keeps_all * logits.numel() * 4)


def _keeps_all_logits(model: Any) -> bool:
    """Whether a model computes the logits of every token, asked for or not."""
    return "logits_to_keep" not in inspect.signature(_inner(model).forward).parameters


def _forward(model: Any, new: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits behind the last token in float32, as transformers' own loop takes them, shape (batch, vocab)."""
    taken = inspect.signature(_inner(model).forward).parameters
    more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    if "position_ids" in taken:
        positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
        more["position_ids"] = positions[:, -new.shape[1] :]
    output = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
    return output.logits[:, -1].float()  # type: ignore[no-any-return]


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
