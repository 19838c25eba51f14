"""How the rows of a batch lie: padded to the longest, in groups of like length, or packed without pads.

What is computed is the same: each row alone, the same terms in the loss. Packed rows cost what their tokens cost, so they
are taken where the model is shown to keep them apart and pads would be a share worth sparing. Where they are not, padded
batches are divided into groups of like length if their passes cost less.
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
from peftlab.grouping import Grouping
from peftlab.isolation import Isolation
from peftlab.method import Head
from peftlab.objective import Objective
from peftlab.streams import permutation

_WORTH = 0.05
"""The share of pads from which packing is worth its regrouping of attention, and of cost from which grouping is worth it."""
_LOOKED_AT = 4096
"""Rows from which shares are estimated."""
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
    if wanted in ("padded", "grouped"):
        return None, f"{wanted}: asked for"
    share = share_of_pads(_drawn(rows), batch_size)
    if wanted == "auto" and share < _WORTH:
        return None, f"padded: only {share:.1%} of the tokens are pads"
    reason = _reason_against(model, family, sample_rows(rows), objective, head=head, pad_id=pad_id)
    if not reason:
        return Isolation(model), f"packed: {share:.1%} of the tokens would be pads, and rows are kept apart"
    if wanted == "packed":
        raise ConfigError(f"training.layout=packed cannot be had here: {reason}; leave it out, or use padded")
    return None, f"padded: {reason}"


def choose_grouping(
    model: nn.Module,
    rows: Sequence[Row],
    objective: Objective,
    *,
    head: Head,
    pad_id: int,
    batch_size: int,
    wanted: Layout = "auto",
) -> tuple[Grouping | None, str]:
    """Whether a run that pads its rows does so in groups of like length.

    Args:
        model: The model with its adapter, without anything that the method adds to its loss.
        rows: The training rows.
        objective: What is minimised.
        head: What the model ends in.
        pad_id: The token that fills padded batches.
        batch_size: Rows of one batch.
        wanted: What was asked for.

    Returns:
        What divides batches, or None; and why, for a log.

    Raises:
        ConfigError: Groups were asked for, and this model computes their rows otherwise.
    """
    if wanted not in ("auto", "grouped"):
        return None, f"whole batches: {wanted} was asked for"
    grouping = Grouping(head)
    padded, divided = grouping.cost(_drawn(rows), batch_size)
    if wanted == "auto":
        if next(model.parameters()).device.type != "cpu":
            return None, "whole batches: what a pass costs beside its tokens is known of processors alone"
        if divided > (1 - _WORTH) * padded:
            return None, f"whole batches: groups of like length would cost {divided / padded:.0%} of them"
    reason = _reason_against_groups(model, sample_rows(rows), objective, head=head, pad_id=pad_id)
    if not reason:
        return grouping, f"grouped by length: passes cost {divided / padded:.0%} of whole batches"
    if wanted == "grouped":
        raise ConfigError(
            f"training.layout=grouped cannot be had here: {reason}; leave it out, or use padded"
        )
    return None, f"whole batches: {reason}"


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """Rows of a split in a random order that is always the same: files are often sorted by length."""
    return [rows[i] for i in permutation(len(rows), 0, "layout")[:_LOOKED_AT]]


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


def _reason_against_groups(
    model: nn.Module, rows: list[Row], objective: Objective, *, head: Head, pad_id: int
) -> str:
    """Why a batch cannot be divided; "" where it can."""
    device = next(model.parameters()).device
    whole = {name: value.to(device) for name, value in Collator(pad_id, head)(rows).items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = float(objective.total(model, whole))
            parts = Grouping(head, pass_tokens=0).split(whole)
            found = sum(float(objective.total(model, part)) for part in parts)
    except (ModelError, RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"its rows fail apart ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    finally:
        model.train(was_training)
    limit = _EXACT.get(_dtype(model), _ROUNDED)
    if not abs(found - expected) <= limit * max(abs(expected), 1.0):
        return f"its rows apart have the loss {found:.6g} instead of {expected:.6g}"
    return ""


def _dtype(model: Any) -> torch.dtype:
    """The narrowest floating dtype of a model's parameters."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    narrowest: torch.dtype = min(found, key=lambda dtype: dtype.itemsize)
    return narrowest
