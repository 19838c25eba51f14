"""What chosen blocks of a model put out, and nothing that comes after the last of them.

The forward pass ends in a hook on the last block asked for, so neither later blocks nor a head run. Of a model with several
towers only the tower asked for runs. Where blocks are shared (ALBERT calls one for every layer) layer i is the i-th call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, repeat
from numbers import Integral
from typing import Any

import torch
from torch import nn

from peftlab.errors import ConfigError, ModelError
from peftlab.family import FamilyMap

_BATCH_FIRST = {"bsh": (0, 1, 2), "sbh": (1, 0, 2), "bhs": (0, 2, 1)}
"""Layout of a stack to the permutation that makes it (batch, seq, hidden)."""


class _Stop(BaseException):
    """Ends a forward pass; no `except Exception` in a model's code can hold it up."""


class BlockOutputs:
    """Runs a model up to the last of some blocks.

    Args:
        model: A transformers model, bare or wrapped by peft.
        family: Its map.
        stack: A name from the map's stacks.
        layers: Layers of that stack, from 0.
        inputs: Names of the arguments that `run` will be given.

    Attributes:
        module: The part of the model that is run: the smallest that holds the blocks and takes the inputs.
        device: Where its inputs go.
        proof: What the map says of the blocks' outputs against the model's hidden states: "equal", or what differs; "no
            certificate" where nothing was tried.

    Raises:
        ConfigError: There is no such stack or layer.
        ModelError: The model has no weights, or no part of it takes such inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        family: FamilyMap,
        *,
        stack: str,
        layers: Sequence[int],
        inputs: Sequence[str] = ("input_ids",),
    ) -> None:
        self.family, self.stack, self.layers = family, stack, _check_layers(family, stack, layers)
        self._model = model
        self.proof = family.proofs[stack].outputs if stack in family.proofs else "no certificate"
        self._paths = [block.path for block in family.blocks(stack)]
        prompts = _prompts(model)
        self._num_virtual = prompts.num_virtual_tokens if prompts else 0
        reader: Any = _holder(model, self._paths[0], inputs)
        self.module = model if prompts else reader  # peft hands its arguments on
        self._parameters = inspect.signature(reader.forward).parameters
        self.device = _input_device(self.module, family)

    def run(self, inputs: Mapping[str, torch.Tensor], *, width: int) -> dict[int, torch.Tensor]:
        """One forward pass.

        Args:
            inputs: The part's arguments, on its device; those that it does not take are left out.
            width: Positions of the stack's input, pads included.

        Returns:
            Layer to output, (batch, width, hidden), before the final norm.

        Raises:
            ModelError: A block did not run, or its output is not one vector for each position.
        """
        found: dict[int, torch.Tensor] = {}
        arguments: dict[str, Any] = {k: v for k, v in inputs.items() if k in self._parameters}
        if "use_cache" in self._parameters:
            arguments["use_cache"] = False
        with ExitStack() as stack:
            calls = count()
            for number, path in enumerate(self._paths):
                shared = self.family.num_outputs(self.stack) > len(self._paths)
                hook = self._hook(calls if shared else repeat(number), found)
                stack.callback(self._model.get_submodule(path).register_forward_hook(hook).remove)
            stack.enter_context(suppress(_Stop))
            self.module(**arguments)
        missing = [layer for layer in self.layers if layer not in found]
        if missing:
            raise ModelError(
                f"layers {missing} of the {self.stack} of this {self.family.model_type} model did not run on these inputs"
            )
        return {layer: self._positions(found[layer], layer, width) for layer in self.layers}

    def _hook(self, layers: Iterator[int], found: dict[int, torch.Tensor]) -> Any:
        """A hook that keeps what a block puts out, and ends the pass after the last one asked for.

        Args:
            layers: The layer that each call of the block is.
            found: Where outputs are kept.
        """

        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            layer = next(layers)
            if layer not in self.layers:
                return
            found[layer] = output if isinstance(output, torch.Tensor) else output[0]
            if len(found) == len(self.layers):
                raise _Stop

        return keep

    def _positions(self, output: torch.Tensor, layer: int, width: int) -> torch.Tensor:
        """A block's output as (batch, width, hidden), without the positions of peft's virtual tokens."""
        if output.dim() == 3:
            output = output.permute(_BATCH_FIRST[self.family.layout(self.stack)])
            if output.shape[1] in (width, width + self._num_virtual):
                return output[:, -width:]
        raise ModelError(
            f"block {layer} of the {self.stack} puts out {tuple(output.shape)} for {width} tokens: this"
            f" {self.family.model_type} model does not keep one vector for each token"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every module is in the mode it was in.

    Args:
        model: Any model.

    Yields:
        Nothing; within, the model is in evaluation mode.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def choose_stack(family: FamilyMap, stack: str | None) -> str:
    """The stack of blocks to look at.

    Args:
        family: The model's map.
        stack: A name; None takes the only stack, or the encoder of an encoder-decoder.

    Returns:
        A name from the map's stacks.

    Raises:
        ConfigError: There is no such stack, or there are several that are no encoder and decoder.
    """
    names = ", ".join(family.stacks)
    if stack is None:
        if len(family.stacks) > 1 and set(family.stacks) != {"encoder", "decoder"}:
            raise ConfigError(
                f"this {family.model_type} model has several stacks: give stack=, one of {names}"
            )
        return next(iter(family.stacks)) if len(family.stacks) == 1 else "encoder"
    if stack not in family.stacks:
        raise ConfigError(f"no stack '{stack}' in this {family.model_type} model; there is: {names}")
    return stack


def reads_target(model: nn.Module, family: FamilyMap, stack: str) -> bool:
    """Whether a stack is the decoder of an encoder-decoder, which reads what has been written and not the text.

    Args:
        model: The model.
        family: Its map.
        stack: A name from the map's stacks.

    Returns:
        Whether it is.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    crosses = any(site.role == "cross_attention" for site in family.mixers(stack))
    return crosses or any("decoder" in part for part in family.blocks(stack)[0].path.split("."))


def _check_layers(family: FamilyMap, stack: str, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers, each once and in order."""
    num_layers = family.num_outputs(stack)
    wrong = [
        i for i in layers if isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= i < num_layers
    ]
    if wrong or not layers:
        raise ConfigError(
            f"layers {wrong or list(layers)}: the {stack} of this {family.model_type} model has layers 0 to"
            f" {num_layers - 1}; give at least one of these"
        )
    return tuple(sorted({int(i) for i in layers}))


def _holder(model: nn.Module, path: str, inputs: Sequence[str]) -> nn.Module:
    """The smallest module around a block that takes the inputs."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        taken = inspect.signature(module.forward).parameters.keys()
        if set(inputs) <= taken:
            return module
        if getattr(module, "main_input_name", "input_ids") in taken - {
            "input_ids"
        }:  # a tower that sees or hears
            break
    raise ModelError(
        f"no part of this {type(model).__name__} around {path} takes {', '.join(inputs)}, so it reads no text"
    )


def _prompts(model: Any) -> Any | None:
    """The config of peft's virtual tokens or prefixes where they are switched on: only the whole model puts them in."""
    config = getattr(model, "active_peft_config", None)
    learnt = config is not None and config.is_prompt_learning and not model._adapters_disabled
    return config if learnt else None


def _input_device(module: nn.Module, family: FamilyMap) -> torch.device:
    """The device that a module's inputs go to."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ModelError(
            f"this {family.model_type} model has no weights (it is on the meta device); load them first"
        )
    return device
