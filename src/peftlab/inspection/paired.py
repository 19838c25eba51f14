"""A base and the same base with its adapter, seen on the same tokens, in one pass where peft can.

peft runs each row of a batch through an adapter of its own, and `__base__` stands for none: the batch is given twice, once
for each, so that one loaded model gives both and nothing has to be stored or aligned. Methods that cannot mix are run
twice, with the adapter off and on.

Source: peft, "Inference with different LoRA adapters in the same batch"; `tuners/lora/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.activations import proof_of
from peftlab.inspection.block_outputs import BlockOutputs, choose_stack, evaluation_mode
from peftlab.mapping import map_model

BASE = "__base__"
"""peft's name for a row without adapter."""


@dataclass(frozen=True, slots=True)
class PairedOutputs:
    """What blocks put out without and with the adapter, for the same tokens.

    Attributes:
        base: Layer to output (batch, seq, hidden) without the adapter; pads are among the positions.
        tuned: The same with the adapter.
        num_passes: 1, or 2 where the method cannot mix.
        note: Why it took two passes; "" otherwise.
    """

    base: Mapping[int, torch.Tensor]
    tuned: Mapping[int, torch.Tensor]
    num_passes: int
    note: str = ""


def paired_outputs(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    *,
    family: FamilyMap | None = None,
    stack: str | None = None,
    unproven: bool = False,
) -> PairedOutputs:
    """Outputs of chosen blocks, base and tuned together.

    Args:
        model: A model wrapped by peft, its one adapter active and not merged; left as it was.
        inputs: The model's arguments, each with the batch first; for a decoder's stack `decoder_input_ids` among them.
        layers: Layers of the stack, from 0.
        family: The model's map where it is at hand.
        stack: A name from the map's stacks; None takes the only one, or the encoder.
        unproven: Take what the blocks put out also where it is not proved to be the model's hidden states.

    Returns:
        Both outputs, on the model's device, before the final norm.

    Raises:
        ModelError: The model has no adapter, or its adapter is merged, so that the base is not there any more; or it
            is not proved what its blocks put out.
        ConfigError: No such stack or layer.

    Example:
        >>> seen = paired_outputs(model, tokenizer("Hello", return_tensors="pt"), [5])
        >>> drift = (seen.tuned[5] - seen.base[5]).norm(dim=-1) / seen.base[5].norm(dim=-1)
    """
    adapter = active_adapter(model)
    family = family or map_model(model)
    stack = choose_stack(family, stack)
    proof_of(family, stack, unproven=unproven)
    last = "decoder_input_ids" if "decoder_input_ids" in inputs and stack != "encoder" else "input_ids"
    needed = ("input_ids", last) if last != "input_ids" else ("input_ids",)
    blocks = BlockOutputs(model, family, stack=stack, layers=layers, inputs=needed)
    placed = {name: tensor.to(blocks.device) for name, tensor in inputs.items()}
    batch, width = placed[last].shape
    with torch.inference_mode(), evaluation_mode(model):
        reason = why_not_mixed(model, batch, adapter)
        if not reason:
            twice = {name: torch.cat([tensor, tensor]) for name, tensor in placed.items()}
            with rows_through(model, [BASE] * batch + [adapter] * batch):
                both = blocks.run(twice, width=width)
            halves = {layer: output.chunk(2) for layer, output in both.items()}
            return PairedOutputs(
                {i: h[0] for i, h in halves.items()}, {i: h[1] for i, h in halves.items()}, 1
            )
        with _without_adapter(model):
            base = blocks.run(placed, width=width)
        return PairedOutputs(base, blocks.run(placed, width=width), 2, reason)


def active_adapter(model: Any) -> str:
    """The name of a model's one active adapter.

    Args:
        model: A model wrapped by peft.

    Returns:
        The name.

    Raises:
        ModelError: peft is not on it, several adapters are active, or one is merged.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ModelError(
            f"this {type(model).__name__} is not wrapped by peft, so there is no base beside a tuned model in it; load a"
            " run or a bundle"
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ModelError(f"{len(active)} adapters are active ({', '.join(active)}); set_adapter one of them")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ModelError("the adapter is merged into the base; unmerge_adapter() first")
    return str(active[0])


def why_not_mixed(model: Any, batch: int, adapter: str) -> str:
    """Why peft cannot run rows through different adapters of this model.

    Args:
        model: A model wrapped by peft.
        batch: Rows of each half.
        adapter: The adapter of the second half.

    Returns:
        The reason; "" where it can.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model.peft_config[adapter].is_prompt_learning:
        return f"{model.peft_config[adapter].peft_type.value} puts its tokens before every row"
    names = [BASE] * batch + [adapter] * batch
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            kind = type(layer).__module__.split(".")[2]  # AdaLoRA's is a LoraLayer, and mixes no rows
            if not isinstance(layer, LoraLayer) or kind == "adalora":
                return f"peft mixes rows for LoRA, not for {kind}"
            try:
                layer._check_forward_args(names, adapter_names=names)  # it looks at the number of rows alone
            except (ValueError, TypeError) as error:
                return str(error)
    return ""


@contextmanager
def rows_through(model: nn.Module, names: list[str]) -> Iterator[None]:
    """A context in which each row goes through its own adapter.

    peft's own context for this leaves its hooks behind where the pass ends early.

    Args:
        model: A model wrapped by peft.
        names: The adapter of each row; `BASE` for none.

    Yields:
        Nothing; within, every pass must have as many rows.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def name_rows(names: list[str], _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs | {"adapter_names": names}

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
                handle = module.register_forward_pre_hook(partial(name_rows, names), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """A context in which the adapter is off; which tensors train is as before afterwards."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])
