"""Where in a sequence a module's result moves when its input is changed at one position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlab.mapping.trace import Call, noise_like, replay


@dataclass(frozen=True, slots=True)
class Shape:
    """How a tensor of hidden states is laid out.

    Attributes:
        batch: Rows.
        length: Positions.
    """

    batch: int
    length: int

    def index(self, tensor: torch.Tensor, position: int) -> tuple[int | slice, ...] | None:
        """Where the first row's position lies in a tensor.

        Args:
            tensor: (batch, seq, ...), (seq, batch, ...), (batch, ..., seq), (streams, batch, seq, ...) or
                (batch * seq, ...).
            position: The position.

        Returns:
            An index, or None where the tensor is laid out in no such way.
        """
        shape = tuple(tensor.shape)
        if len(shape) >= 2 and shape[:2] == (self.batch, self.length):
            return (0, position)
        if len(shape) >= 2 and shape[:2] == (self.length, self.batch):
            return (position, 0)
        if len(shape) == 3 and (shape[0], shape[2]) == (self.batch, self.length):
            return (0, slice(None), position)
        if len(shape) == 4 and shape[1:3] == (self.batch, self.length):  # Gemma 3n's several streams
            return (slice(None), 0, position)
        if shape[:1] == (self.batch * self.length,):
            return (position,)
        return None

    def moved(self, before: torch.Tensor, after: torch.Tensor, *, tolerance: float = 1e-5) -> list[bool]:
        """At which positions of the first row two results differ.

        Args:
            before: A result.
            after: Another of the same shape.
            tolerance: Share of the largest value below which they count as equal.

        Returns:
            One truth value per position.
        """
        difference = (after - before).abs()
        bar = tolerance * max(1e-6, float(before.abs().max()))
        places = [self.index(before, p) for p in range(self.length)]
        return [place is not None and bool(difference[place].max() > bar) for place in places]


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a change at one position reaches.

    Attributes:
        here: Whether the result moved at that position.
        earlier: Whether it moved before it.
        later: Whether it moved after it.
    """

    here: bool
    earlier: bool
    later: bool

    @property
    def elsewhere(self) -> bool:
        """Whether the result moved at another position: tokens are mixed."""
        return self.earlier or self.later


def reach(module: nn.Module, call: Call, shape: Shape) -> Reach | None:
    """How far a change of a module's own input at one position reaches.

    Args:
        module: The module.
        call: Its recorded call.
        shape: Batch and length of the stack it lies in.

    Returns:
        The reach, or None where input or output have no positions.
    """
    hidden, before = call.hidden, call.result
    if hidden is None or before is None:
        return None
    if (
        shape.index(hidden, 0) is None
        and hidden.dim() == 3
        and hidden.shape[:2].numel() == shape.batch * shape.length
    ):
        shape = Shape(*hidden.shape[:2])  # windows of a picture stand as rows (Swin)
    position = shape.length // 2
    place = shape.index(hidden, position)
    if place is None or shape.index(before, position) is None:
        return None
    changed = hidden + noise_like(hidden, at=place)
    after = replay(module, call.with_tensor(hidden, changed))
    if after is None or after.shape != before.shape:
        return None
    moved = shape.moved(before, after)
    return Reach(moved[position], any(moved[:position]), any(moved[position + 1 :]))


def depends_on_more(module: nn.Module, call: Call, shape: Shape) -> bool:
    """Whether a module's result at a position depends on more than its arguments at that position.

    Args:
        module: The module.
        call: Its recorded call; `reach` has shown that its own input stays at its position.
        shape: Batch and length of the stack it lies in.

    Returns:
        True where another argument moves the result elsewhere, or has other positions than the result.
    """
    before, position = call.result, shape.length // 2
    for tensor in call.tensors():
        if tensor is call.hidden or not tensor.is_floating_point() or tensor.dim() != 3 or before is None:
            continue  # a mask has four axes and is no sequence
        place = shape.index(tensor, position)
        after = replay(module, call.with_tensor(tensor, tensor + noise_like(tensor, at=place)))
        if after is None or after.shape != before.shape:
            return True
        moved = shape.moved(before, after)
        elsewhere = moved if place is None else [*moved[:position], *moved[position + 1 :]]
        if any(elsewhere):
            return True
    return False


def looks_across(module: nn.Module, call: Call, shape: Shape, other_length: int) -> bool:
    """Whether a module's result depends on another sequence among its arguments (cross attention).

    Args:
        module: The module.
        call: Its recorded call.
        shape: Batch and length of its own stack.
        other_length: Length of the other stack's sequence; differs from its own.

    Returns:
        True where a change of the other sequence at one position moves the result.
    """
    other, before = Shape(shape.batch, other_length), call.result
    for tensor in call.tensors():
        floats = tensor.is_floating_point() and tensor.dim() == 3 and tensor is not call.hidden
        place = other.index(tensor, other_length // 2) if floats else None
        if place is None or before is None:
            continue
        after = replay(module, call.with_tensor(tensor, tensor + noise_like(tensor, at=place)))
        if after is not None and after.shape == before.shape and any(shape.moved(before, after)):
            return True
    return False
