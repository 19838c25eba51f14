"""Base and tuned model in one loaded model: which layer of one is which of the other, and one pass for both.

Where peft can give each row its own adapter, a batch is given twice, the first half through `__base__`: one pass. That it
gives what two passes give is tried on the first rows, because new blocks, or biases of the base that train, are seen by
every row. Where it cannot, the base is what the attachment answers when it is off. Under virtual tokens and prefixes it is
the model inside peft's wrapper: peft 0.21.2 breaks `disable_adapter` for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.activations import proof_of
from peftlab.inspection.attention_source import undisturbed
from peftlab.inspection.block_outputs import BlockOutputs
from peftlab.inspection.paired import BASE, active_adapter, rows_through, why_not_mixed
from peftlab.mapping import map_model
from peftlab.method import Attachment

Tensors = dict[int, torch.Tensor]
"""Layer of the base, or `OUTPUT`, to a tensor."""
OUTPUT = -1
"""The last layer of either side, which is another block where the tuned model ends in a new one."""

_FULL, _HALF = 1e-3, 5e-2
"""How far a token's states may be off between one pass and two, relative to their length: in float32 or wider, in half."""


@dataclass(frozen=True, slots=True)
class LayerPairs:
    """Which layers of one stack are the same block on both sides.

    Attributes:
        pairs: Layer of the base to layer of the tuned model.
        added: Layers of the tuned model that the base does not have.
    """

    pairs: Mapping[int, int]
    added: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Sides:
    """The two sides of one attachment.

    Args:
        attachment: An adapter on its base, with weights.

    Attributes:
        attachment: The adapter.
        tuned_family: The map of the tuned model.
        base_family: The map of the base, with paths in what `base` yields.
        note: Why it takes two passes; "" where one is enough.
    """

    attachment: Attachment
    tuned_family: FamilyMap = field(init=False)
    base_family: FamilyMap = field(init=False)
    note: str = field(init=False, default="")
    _adapter: str = field(init=False, default="")
    _layers: dict[str, LayerPairs] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tuned_family = map_model(self.tuned)
        tuned = {stack: _blocks(self.tuned, self.tuned_family, stack) for stack in self.tuned_family.stacks}
        with self.base() as model:
            self.base_family = map_model(model)
            for stack in self.base_family.stacks:
                base = _blocks(model, self.base_family, stack)
                self._layers[stack] = _paired(self.base_family, self.tuned_family, stack, base, tuned[stack])
        self.note = self._why_two_passes()

    @property
    def tuned(self) -> Any:
        """The tuned model."""
        return self.attachment.model

    @property
    def num_passes(self) -> int:
        """Passes that a batch takes: 1 or 2."""
        return 2 if self.note else 1

    @contextmanager
    def base(self) -> Iterator[Any]:
        """A context in which the base answers.

        Yields:
            The base.
        """
        if self._reads_prompts():
            yield self.tuned.base_model
            return
        with self.attachment.disabled():
            yield self.tuned

    def layers(self, stack: str) -> LayerPairs:
        """Which layers of a stack belong together.

        Args:
            stack: A name from the base's stacks.

        Returns:
            The pairs.
        """
        return self._layers[stack]

    def both(self, rows: int, run: Callable[[Any, FamilyMap, int], Any]) -> tuple[Any, Any] | Any:
        """Run something on both sides.

        Args:
            rows: Rows of the batch.
            run: Is given a model, its map and how often the batch is to be laid behind itself, 1 or 2.

        Returns:
            In one pass what `run` gave for twice the rows, the base's first; else what it gave for the base and what it
            gave for the tuned model.
        """
        with undisturbed(self.tuned):
            if not self.note:
                with rows_through(self.tuned, [BASE] * rows + [self._adapter] * rows):
                    return run(self.tuned, self.tuned_family, 2)
            with self.base() as model:
                first = run(model, self.base_family, 1)
            return first, run(self.tuned, self.tuned_family, 1)

    def hidden_states(
        self, stack: str, inputs: Mapping[str, torch.Tensor], width: int
    ) -> tuple[Tensors, Tensors]:
        """What every block that both sides have puts out, and the last one of each side, before the final norm.

        Args:
            stack: A name from the base's stacks.
            inputs: The model's arguments, (batch, seq).
            width: Positions of the stack's input, pads included.

        Returns:
            Layer of the base to (batch, width, hidden), without and with the adapter.

        Raises:
            ModelError: The model does not keep one vector for each token.
        """
        pairs = self.layers(stack).pairs
        names = tuple(name for name in ("input_ids", "decoder_input_ids") if name in inputs)

        def run(model: nn.Module, family: FamilyMap, times: int) -> Tensors:
            last = family.num_outputs(stack) - 1
            wanted = pairs if family is not self.base_family else {i: i for i in pairs}
            blocks = BlockOutputs(model, family, stack=stack, layers=[*wanted.values(), last], inputs=names)
            placed = {name: torch.cat([tensor.to(blocks.device)] * times) for name, tensor in inputs.items()}
            outputs = blocks.run(placed, width=width)
            return {i: outputs[j] for i, j in wanted.items()} | {OUTPUT: outputs[last]}

        found = self.both(len(inputs["input_ids"]), run)
        if isinstance(found, tuple):
            return found
        halves = {layer: states.chunk(2) for layer, states in found.items()}
        return {i: h[0] for i, h in halves.items()}, {i: h[1] for i, h in halves.items()}

    def prove(self, stack: str, inputs: Mapping[str, torch.Tensor], width: int) -> None:
        """Try on some rows that one pass gives what two give; where it does not, two are taken from then on.

        Args:
            stack: A name from the base's stacks.
            inputs: The model's arguments, (batch, seq).
            width: Positions of the stack's input.

        Raises:
            ModelError: It is not proved what the blocks put out.
        """
        proof_of(self.base_family, stack)
        if self.note:
            return
        try:
            together = self.hidden_states(stack, inputs, width)
        except (
            ValueError,
            RuntimeError,
        ) as error:  # OPT lays all tokens of a batch behind each other: peft misses its rows
            self.note = f"peft cannot tell this model's rows apart: {error}"
            return
        self.note = "one pass for both is not tried"
        apart = self.hidden_states(stack, inputs, width)
        real = inputs[real_mask(inputs, stack_is_decoder="decoder_input_ids" in inputs)].bool()
        worst = max(
            _distance(one[layer], two[layer], real)
            for one, two in zip(together, apart, strict=True)
            for layer in one
        )
        half = torch.finfo(next(iter(apart[0].values())).dtype).eps > 1e-6
        is_same = worst <= (_HALF if half else _FULL)  # NaN is not
        self.note = (
            "" if is_same else f"in one pass states differ by {worst:.2g} of their length from two passes"
        )

    def _reads_prompts(self) -> bool:
        """Whether the adapter is read beside the text."""
        configs = getattr(self.tuned, "peft_config", None) or {}
        return any(config.is_prompt_learning for config in configs.values())

    def _why_two_passes(self) -> str:
        """Why a batch cannot go through both sides at once; "" where it can."""
        if not getattr(self.tuned, "peft_config", None):
            return f"{type(self.attachment).__name__} is no adapter of peft, which mixes rows"
        if self.attachment.rewritten:
            return f"it changes tensors of the base ({self.attachment.rewritten[0]}), which every row reads"
        if any(pairs.added for pairs in self._layers.values()):
            return "it adds blocks, which every row goes through"
        try:
            self._adapter = active_adapter(self.tuned)
        except ModelError as error:
            return str(error)
        return why_not_mixed(self.tuned, 1, self._adapter)


def real_mask(inputs: Mapping[str, torch.Tensor], *, stack_is_decoder: bool) -> str:
    """The name of the mask over what a stack reads.

    Args:
        inputs: The model's arguments.
        stack_is_decoder: Whether it is the decoder beside an encoder.

    Returns:
        "attention_mask" or "decoder_attention_mask".
    """
    return "decoder_attention_mask" if stack_is_decoder else "attention_mask"


def _blocks(model: nn.Module, family: FamilyMap, stack: str) -> list[nn.Module]:
    """The blocks of a stack."""
    return [model.get_submodule(site.path) for site in family.blocks(stack)]


def _paired(
    base_family: FamilyMap, tuned_family: FamilyMap, stack: str, base: list[nn.Module], tuned: list[nn.Module]
) -> LayerPairs:
    """Which layers are the same block.

    Raises:
        ModelError: The tuned model lacks a block of the base.
    """
    number = base_family.num_outputs(stack)
    if number != len(base):  # shared blocks: layer i is the i-th run
        return LayerPairs({i: i for i in range(number)})
    places = {id(block): place for place, block in enumerate(tuned)}
    missing = [i for i, block in enumerate(base) if id(block) not in places]
    if missing:
        raise ModelError(f"block {missing[0]} of the {stack} is in the base and not in the tuned model")
    pairs = {i: places[id(block)] for i, block in enumerate(base)}
    return LayerPairs(pairs, tuple(i for i in range(len(tuned)) if i not in pairs.values()))


def _distance(one: torch.Tensor, other: torch.Tensor, real: torch.Tensor) -> float:
    """The largest distance of a real token's states, relative to their length."""
    chosen = real.to(one.device)
    precise = torch.promote_types(one.dtype, torch.float32)
    difference = (one[chosen].to(precise) - other[chosen].to(precise)).norm(dim=-1)
    length = other[chosen].to(precise).norm(dim=-1).clamp_min(torch.finfo(precise).tiny)
    return float((difference / length).max())
