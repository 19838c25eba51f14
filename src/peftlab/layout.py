"""How the rows of a batch lie: padded to the longest, or packed one behind the other without pads.

What is computed is the same: each row alone, the same terms in the loss. Packed rows cost what their tokens cost, so they
are taken where the model is shown to keep them apart and pads would be a share worth sparing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftlab.batches import Collator, PackingCollator, Row
from peftlab.config import Layout
from peftlab.errors import ConfigError, ModelError
from peftlab.family import FamilyMap
from peftlab.isolation import Isolation
from peftlab.method import Head
from peftlab.objective import Objective

_WORTH = 0.05
"""The share of pads from which packing is worth its regrouping of attention."""
_EXACT = {torch.float64: 1e-9, torch.float32: 2e-5}
_ROUNDED = 2e-2
"""How far the loss of packed rows may be from that of padded ones, as a share; in half precision the masks say more."""


def choose_layout(
    model: nn.Module,
    family: FamilyMap,
    rows: Sequence[Row],
    objective: Objective,
    *,
    head: Head,
    pad_id: int,
    batch_size: int,
    wanted: Layout = "auto",
) -> tuple[Isolation | None, str]:
    """Whether a run packs its rows.

    Args:
        model: The model with its adapter, without anything that the method adds to its loss.
        family: Its map.
        rows: The training rows.
        objective: What is minimised.
        head: What the model ends in.
        pad_id: The token that fills padded batches.
        batch_size: Rows of one batch.
        wanted: What was asked for.

    Returns:
        What keeps packed rows apart, or None for padded batches; and why, for a log.

    Raises:
        ConfigError: Packed rows were asked for, and this model cannot have them.
    """
    if wanted == "padded":
        return None, "padded: asked for"
    share = share_of_pads(rows, batch_size)
    if wanted == "auto" and share < _WORTH:
        return None, f"padded: only {share:.1%} of the tokens are pads"
    reason = _reason_against(model, family, sample_rows(rows), objective, head=head, pad_id=pad_id)
    if not reason:
        return Isolation(model), f"packed: {share:.1%} of the tokens would be pads, and rows are kept apart"
    if wanted == "packed":
        raise ConfigError(f"training.layout=packed cannot be had here: {reason}; leave it out, or use padded")
    return None, f"padded: {reason}"


def share_of_pads(rows: Sequence[Row], batch_size: int) -> float:
    """The share of pads in padded batches of rows, in the order that they have here.

    Args:
        rows: The rows.
        batch_size: Rows of one batch.

    Returns:
        Pads by all tokens, from 0 to 1.
    """
    lengths = [len(row.input_ids) for row in rows]
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    whole = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / whole if whole else 0.0


def sample_rows(rows: Sequence[Row]) -> list[Row]:
    """Up to three of the first rows, short ones of different lengths: what a model is tried with.

    Args:
        rows: The rows.
    """
    by_length: dict[int, Row] = {}
    for row in rows[:256]:
        by_length.setdefault(len(row.input_ids), row)
    chosen = [by_length[length] for length in sorted(by_length)[:3]]
    return chosen if len(chosen) > 1 else list(rows[:2])


def _reason_against(
    model: nn.Module, family: FamilyMap, rows: list[Row], objective: Objective, *, head: Head, pad_id: int
) -> str:
    """Why rows cannot be packed; "" where they can."""
    if head != "causal":
        return f"only causal models tell rows apart by their positions, and this one is for {head}"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "virtual tokens stand before each row"
    if len(rows) < 2:
        return "there is one row only"
    device = next(model.parameters()).device
    padded = {name: value.to(device) for name, value in Collator(pad_id, head)(rows).items()}
    packed = {name: value.to(device) for name, value in PackingCollator()(rows).items()}
    isolation = Isolation(model, strict=True)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = float(objective.total(model, padded))
            with isolation.rows(packed["position_ids"]):
                found = float(objective.total(model, packed))
    except (ModelError, RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"packed rows fail ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    finally:
        model.train(was_training)
    num_blocks = sum(len(family.order(stack)) for stack in family.stacks)
    if isolation.num_calls != num_blocks:
        return f"{isolation.num_calls} of its {num_blocks} blocks let attention be computed row by row"
    limit = _EXACT.get(_dtype(model), _ROUNDED)
    if not abs(found - expected) <= limit * max(abs(expected), 1.0):
        return f"packed rows have the loss {found:.6g} instead of {expected:.6g}"
    return ""


def _dtype(model: Any) -> torch.dtype:
    """The narrowest floating dtype of a model's parameters."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    narrowest: torch.dtype = min(found, key=lambda dtype: dtype.itemsize)
    return narrowest
