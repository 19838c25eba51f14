"""What a transformers model is called with, and how it grows when something is put in front of the text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftlab.errors import MethodError

TEXT_LIKE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels")
"""Arguments with one entry per token that are known here."""


class NamedArguments:
    """Gives the arguments of a module's calls by name.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of one call.

        Args:
            args: Those given by position.
            kwargs: Those given by name.

        Returns:
            Name to value.
        """
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)


def text_shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and tokens of a call.

    Args:
        given: The call's arguments.

    Returns:
        (batch, seq), or None where no text is given.
    """
    for name in ("input_ids", "inputs_embeds"):
        text = given.get(name)
        if isinstance(text, torch.Tensor):
            return text.shape[0], text.shape[1]
    return None


def cached_tokens(given: Mapping[str, Any]) -> int:
    """How many tokens the cache of a call holds already.

    Args:
        given: The call's arguments.

    Returns:
        The count; 0 without a cache.
    """
    cache = given.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def in_front(tensor: torch.Tensor, count: int, value: float) -> torch.Tensor:
    """A tensor with more positions in front of those it has.

    Args:
        tensor: (batch, seq).
        count: How many positions.
        value: What stands in them.

    Returns:
        (batch, count + seq).
    """
    return torch.cat([tensor.new_full((tensor.shape[0], count), value), tensor], dim=1)


def longer_mask(mask: Any, count: int) -> torch.Tensor:
    """An attention mask in which what was put in front is seen.

    Args:
        mask: (batch, seq), 1 where a token is seen.
        count: How many positions were put in front.

    Returns:
        (batch, count + seq).

    Raises:
        MethodError: The mask has another form.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise MethodError(
            f"an attention mask of (batch, seq) is needed to put something in front of it, not {shape}"
        )
    return in_front(mask, count, 1)


def shifted_positions(positions: torch.Tensor, count: int, *, own: bool) -> torch.Tensor:
    """Position ids of a text that has something in front of it.

    Args:
        positions: (batch, seq), as given for the text alone.
        count: How many positions were put in front.
        own: Whether these are positions of the call (virtual tokens) or stand in a cache.

    Returns:
        The text's ids moved by `count`, with 0 to count - 1 in front where they are the call's own.

    Raises:
        MethodError: Position ids of another form.
    """
    if positions.dim() != 2:
        raise MethodError(f"position ids of (batch, seq) are needed, not {tuple(positions.shape)}")
    moved = positions + count
    if not own:
        return moved
    first = torch.arange(count, dtype=positions.dtype, device=positions.device)
    return torch.cat([first.expand(positions.shape[0], -1), moved], dim=1)
