"""Which attention is asked for, and of what input: layers, heads and kind against the map, texts to tensors, pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from peftlab.attention_interface import AttentionCall
from peftlab.errors import ConfigError, ModelError
from peftlab.family import FamilyMap

Kind = Literal["self", "cross"]

_ROLES: dict[Kind, str] = {"self": "attention", "cross": "cross_attention"}


class LayerSite(NamedTuple):
    """Where a layer's token mixer is."""

    layer: int
    path: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Which attention of a model is asked for.

    Attributes:
        stack: The stack of blocks.
        kind: Self attention, or cross attention to the encoder.
        layers: Layers in the stack; None for all whose token mixer is attention (Mamba's is not).
        heads: Heads in the order wanted; None for all.
        repeated: Whether blocks run more than once in a pass (ALBERT), so that layer i is the i-th run.
    """

    stack: str
    kind: Kind
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    repeated: bool = False

    def includes(self, layer: int) -> bool:
        """Whether a layer is asked for."""
        return self.layers is None or layer in self.layers


def choose(
    family: FamilyMap,
    *,
    kind: Kind = "self",
    stack: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Choice:
    """Resolve what a person asks for against a model's map.

    Args:
        family: The map.
        kind: Self or cross attention.
        stack: None takes the first stack that has this kind.
        layers: None takes all that turn out to have this kind.
        heads: None takes all.

    Returns:
        The choice.

    Raises:
        ModelError: The model has no such attention.
        ConfigError: No such stack or layer, or a layer without attention.
    """
    if kind not in _ROLES:
        raise ConfigError(f"kind '{kind}' of attention: expected 'self' or 'cross'")
    found = {name: [site.layer for site in mixers(family, name, kind)] for name in family.stacks}
    stacks = [name for name in found if found[name]]
    if not stacks:
        raise ModelError(f"this {family.model_type} model has no {kind} attention")
    if stack is not None and stack not in stacks:
        raise ConfigError(
            f"no {kind} attention in stack '{stack}' of this model; there is: {', '.join(stacks)}"
        )
    stack = stack or stacks[0]
    repeated = family.num_outputs(stack) > family.num_blocks(stack)
    there = list(range(family.num_outputs(stack))) if repeated else found[stack]
    missing = [i for i in layers or () if i not in there]
    if missing or (layers is not None and not layers):
        raise ConfigError(
            f"no {kind} attention in layer {missing[0] if missing else '(none given)'} of '{stack}':"
            f" this {family.model_type} model has it in {ranges(there)}"
        )
    if heads is not None and (not heads or min(heads) < 0):
        raise ConfigError(f"heads {list(heads)}: expected indices from 0, or None for all")
    return Choice(
        stack,
        kind,
        None if layers is None else tuple(dict.fromkeys(layers)),
        None if heads is None else tuple(heads),
        repeated,
    )


def check_heads(heads: Sequence[int] | None, num_heads: int) -> None:
    """Refuse heads that a layer does not have.

    Args:
        heads: What was asked for.
        num_heads: How many there are.

    Raises:
        ConfigError: One is out of range.
    """
    if heads is not None and max(heads) >= num_heads:
        raise ConfigError(f"no head {max(heads)}: this model's attention has heads 0 to {num_heads - 1}")


def mixers(family: FamilyMap, stack: str, kind: Kind) -> list[LayerSite]:
    """The token mixers of one kind in a stack.

    Args:
        family: The map.
        stack: A name from its `stacks`.
        kind: Self or cross attention.

    Returns:
        Layer and path of each, in the order of layers.
    """
    found = (site for site in family.mixers(stack) if site.role == _ROLES[kind])
    return [LayerSite(site.layer, site.path) for site in found if site.layer is not None]


def ranges(layers: Sequence[int]) -> str:
    """Layers in words: "layers 0 to 5", "layers 0, 2, 4".

    Args:
        layers: Increasing indices.

    Returns:
        The words.
    """
    numbers = list(dict.fromkeys(layers))
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


class Numbering:
    """Tells which layer an attention call is of, one call after the other in one forward pass.

    Args:
        model: The mapped model.
        family: Its map.
        choice: Stack and kind.
    """

    def __init__(self, model: nn.Module, family: FamilyMap, choice: Choice) -> None:
        self.repeated = choice.repeated
        self.layers = {
            module: site.layer
            for site in mixers(family, choice.stack, choice.kind)
            for module in model.get_submodule(site.path).modules()
        }
        self.runs = 0
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, call: AttentionCall) -> int | None:
        """Number a call.

        Args:
            call: The next one.

        Returns:
            The layer; None for a call of another stack or kind, and where the attention just seen is applied to other values
            (DiffLlama).
        """
        layer = self.layers.get(call.module)
        again = self.last is not None and call.query is self.last[0] and call.key is self.last[1]
        if layer is None or again:
            return None
        self.last = call.query, call.key
        self.runs += 1
        return self.runs - 1 if self.repeated else layer
