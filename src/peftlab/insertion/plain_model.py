"""Whether new blocks can stay for good: whether the model's class and config alone make this very model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftlab.errors import MethodError, NonFiniteError
from peftlab.insertion.new_blocks import GATE

if TYPE_CHECKING:
    from peftlab.insertion.new_layers import NewLayers

_PLAIN = (bool, int, float, str, type(None))
_LIVE_ONLY = frozenset({"training", "gradient_checkpointing", "name_or_path"})


def check_can_stay(model: nn.Module, layers: NewLayers) -> None:
    """Refuse blocks that are no part of a plain model.

    Args:
        model: The base with the blocks in it.
        layers: The new blocks.

    Raises:
        MethodError: A gate is not one, or the base's class does not build this model from its config.
        NonFiniteError: A value of a block is not finite.
    """
    for name, tensor in layers.state().items():
        value = tensor.detach()
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{name} has values that are not finite: the new block is not merged")
        if name.endswith(f".{GATE}") and float(value) != 1:
            raise MethodError(
                f"{name} is {float(value):.3g}: the block is added to its input in part, y = x + gate (block(x) - x), which"
                f" no block of a plain {type(model).__name__} does; keep it beside the base (save), or take it out (remove)"
            )
    check_plain(model)


def check_plain(model: Any) -> None:
    """Refuse a model that transformers would not build from its own config.

    Args:
        model: A transformers model with new blocks, adapters of peft beside its layers or not; another module passes.

    Raises:
        MethodError: Its class, built from its config, has other modules, tensors or plain attributes.
    """
    if not hasattr(type(model), "_from_config"):
        return
    config = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            sketch: nn.Module = type(model)._from_config(config)
    except Exception as error:  # model code can fail in any way; the message says how
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MethodError(
            f"{type(model).__name__} cannot be built from its config any more: {line}"
        ) from error
    found = next(_differences(model, sketch), None)
    if found is not None:
        raise MethodError(
            f"a plain {type(model).__name__} of its config is not this model: {found}; save the new block as an adapter"
            " instead, or train it at another position"
        )


def _differences(model: nn.Module, sketch: nn.Module) -> Iterator[str]:
    """What a model and an empty one of its config do not have in common, in words."""
    for path, plain in sketch.named_modules():
        live = _at(model, path)
        if live is None or type(live) is not type(plain):
            yield f"'{path}' is {type(live).__name__ if live else 'missing'} here and {type(plain).__name__} there"
            continue
        more = sorted(live._modules.keys() ^ plain._modules.keys())
        if more:
            yield f"'{path}.{more[0]}' is not in both"
        for kind in ("_parameters", "_buffers"):
            here, there = (
                {n: tuple(t.shape) for n, t in vars(m)[kind].items() if t is not None and n != GATE}
                for m in (live, plain)
            )
            if here != there:
                yield f"the tensors of '{path}' are {here} here and {there} there"
        for name, value in vars(plain).items():
            if name.startswith("_") or name in _LIVE_ONLY or not isinstance(value, _PLAIN):
                continue
            own = vars(live).get(name)
            if own != value:
                yield f"'{path}.{name}' is {own} here and {value} there"


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, behind what peft has put around it and those above it."""
    module = _unwrapped(model)
    for name in path.split(".") if path else ():
        inner = module._modules.get(name)
        if inner is None:
            return None
        module = _unwrapped(inner)
    return module


def _unwrapped(module: Any) -> nn.Module:
    """A module without peft's layers around it."""
    while True:
        if hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        elif isinstance(getattr(module, "original_module", None), nn.Module):
            module = module.original_module
        else:
            found: nn.Module = module
            return found
