"""Which prompts are decoded together: by length, within the memory, and only where they are answered as they are alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from peftlab import decode_loop
from peftlab.devices import report_memory
from peftlab.errors import EvaluationError

_SHARE_OF_MEMORY = 0.25


def tokens_that_fit(model: Any) -> int:
    """Tokens, of prompts and answers, whose keys, values and passing tensors take a quarter of the free memory.

    Args:
        model: A model that `decode_loop.why_not` has nothing against.

    Returns:
        Their number.
    """
    return bytes_that_fit(model) // decode_loop.bytes_per_token(model)


def bytes_that_fit(model: Any) -> int:
    """A quarter of what is free in the memory of a model's device."""
    report = report_memory()
    on_host = next(model.parameters()).device.type == "cpu" or report.device_free_bytes is None
    free = report.host_available_bytes if on_host else report.device_free_bytes
    return int(_SHARE_OF_MEMORY * (free or 0))


def are_close(model: Any, alone: torch.Tensor, beside: torch.Tensor, power: float = 0.5) -> bool:
    """Whether logits agree up to a power of what the model's numbers are rounded to, of their range.

    Args:
        model: The model that gave them.
        alone: Of a prompt alone.
        beside: Of the same in another way, of the same shape.
        power: The power: its root tells another answer from rounding.

    Returns:
        Whether they do; so they do where none is finite, which is told where the prompts are answered.
    """
    known = alone.isfinite()
    if not bool(known.any()):
        return True  # told where the prompts are answered
    kinds = {alone.dtype, torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    allowed = max(torch.finfo(kind).eps for kind in kinds) ** power
    alone, difference = alone[known], (alone[known] - beside[known]).abs().max()
    return bool((known == beside.isfinite()).all()) and bool(
        difference <= allowed * (alone.max() - alone.min())
    )


def make_room(model: Any, rows: list[list[int]]) -> None:
    """Give a GPU's cached memory back before a smaller batch is tried; refuse where there is none.

    Args:
        model: The model.
        rows: The prompts that did not fit.

    Raises:
        EvaluationError: It is one prompt.
    """
    if len(rows) == 1:
        raise EvaluationError(
            f"one prompt of {len(rows[0])} tokens does not fit the memory of {next(model.parameters()).device};"
            " set a smaller task.max_length or evaluation.max_new_tokens, or use another device"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches(
    prompts: Sequence[list[int]],
    batch_size: int,
    *,
    padded: bool,
    room: int = 0,
    most_tokens: int | None = None,
) -> Iterator[list[int]]:
    """Numbers of prompts decoded together, shortest first; only of one length where none may be padded.

    Args:
        prompts: Token rows.
        batch_size: Most prompts of a batch.
        padded: Whether prompts of several lengths may be together.
        room: Tokens of an answer.
        most_tokens: Most tokens of a batch, pads and room for the answers included; None bounds nothing.

    Yields:
        The numbers of one batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    alike = [order] if padded else [list(g) for _, g in itertools.groupby(order, lambda i: len(prompts[i]))]
    for group in alike:
        batch: list[int] = []
        for i in group:
            tokens = (len(batch) + 1) * (len(prompts[i]) + room)
            if batch and (len(batch) == batch_size or (most_tokens is not None and tokens > most_tokens)):
                yield batch
                batch = []
            batch.append(i)
        yield from [batch] if batch else []


def pad(rows: Sequence[list[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor.

    Args:
        rows: Token rows.
        pad_id: Token that fills.
        left: Whether pads stand in front, else behind.

    Returns:
        Tokens and attention mask, each (batch, seq).
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask
