"""How many tokens a row may have on a model: what its positions leave beside virtual tokens and the answer."""

from __future__ import annotations

from typing import Any

from peftlab.errors import ConfigError
from peftlab.method import Head

_LEAST = 1
"""Tokens of the shortest prompt."""


def count_positions(model: Any) -> int | None:
    """How many tokens a model has positions for, those that an adapter puts in front taken off.

    Args:
        model: A bare model, or one wrapped by peft.

    Returns:
        Tokens; None where the model sets no limit. RoBERTa and its kin count from behind their pad token, so that they
        have fewer than their config says.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return None
    positions = int(limit)
    for name, module in model.named_modules():
        pad = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and pad is not None:
            positions = min(positions, module.num_embeddings - pad - 1)
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        positions -= int(config.num_virtual_tokens)
    return max(0, positions)


def row_room(model: Any, max_length: int) -> int:
    """How many tokens a row may have.

    Args:
        model: A bare model, or one wrapped by peft.
        max_length: `task.max_length`.

    Returns:
        The smaller of `max_length` and the model's positions.

    Raises:
        ConfigError: The model has hardly any position left.
    """
    positions = count_positions(model)
    room = max_length if positions is None else min(max_length, positions)
    return _enough(room, f"the model has {positions} positions left beside virtual tokens")


def prompt_room(model: Any, head: Head, *, max_length: int, max_new_tokens: int) -> int:
    """How many tokens a prompt may have.

    Args:
        model: A bare model, or one wrapped by peft.
        head: What it ends in.
        max_length: `task.max_length`; it does not bound the prompt of a causal model, whose answer is no part of it.
        max_new_tokens: Longest answer, which a causal model writes behind its prompt.

    Returns:
        Tokens; very large where nothing limits them.

    Raises:
        ConfigError: Hardly any token is left for the prompt.
    """
    if head != "causal":
        return row_room(model, max_length)
    positions = count_positions(model)
    if positions is None:
        return 1 << 20
    return _enough(
        positions - max_new_tokens,
        f"evaluation.max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's {positions}"
        " positions; set a smaller one",
    )


def _enough(room: int, why: str) -> int:
    """Refuse room in which no prompt fits."""
    if room < _LEAST:
        raise ConfigError(why)
    return room
