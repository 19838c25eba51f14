"""An adapter folded into the base's weights for as long as answers are made, and the weights put back to the bit.

Beside its base an adapter costs products of its own in every layer, small ones that take far longer than their
multiplications. peft folds and unfolds (`merge_adapter`, `unmerge_adapter`); but what is added to a float and taken away
again is not what was there, so the weights themselves are kept and put back. In half precision an update is rounded away
where it is small beside its weight, and the adapter stays beside the base.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1 ("no additional inference latency").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_EXACT = (torch.float32, torch.float64)
_FAILURES = (AttributeError, RuntimeError, TypeError, ValueError)


@contextmanager
def folded(model: Any, *, most_bytes: int) -> Iterator[bool]:
    """A context in which an adapter of peft is in the weights of its base, where it can be.

    Args:
        model: A model, bare or wrapped by peft, its adapter active.
        most_bytes: What the kept weights may take.

    Yields:
        Whether it is. Where it is not, nothing has changed. Afterwards every tensor of the base is the one it was before,
        the same object with the same bits.
    """
    tuner = getattr(model, "base_model", None)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    weights = _weights(model, layers) if hasattr(type(tuner), "merge_adapter") else []
    if not weights or sum(p.numel() * p.element_size() for p in weights) > most_bytes:
        yield False
        return
    kept = {parameter: parameter.data for parameter in weights}
    try:
        yield _fold(tuner, layers, kept)
    finally:
        _unfold(tuner, layers, kept)


def _weights(model: nn.Module, layers: list[Any]) -> list[nn.Parameter]:
    """What adapters of peft stand beside, each once; empty where they must not be folded.

    That is where there are none or they are off, where one is folded already or stands on another, and where a weight is of
    half precision, packed, or shared with another module, which would then change too.
    """
    found: dict[int, nn.Parameter] = {}
    for layer in layers:
        base = layer.get_base_layer()
        if layer.disable_adapters or layer.merged_adapters or any(map(_is_adapted, base.modules())):
            return []
        found |= {id(p): p for p in base.parameters()}
    users = [id(p) for m in model.modules() for p in m._parameters.values() if id(p) in found]
    if len(users) != len(found) or any(p.dtype not in _EXACT or p.is_meta for p in found.values()):
        return []
    return list(found.values())


def _is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of peft itself."""
    return isinstance(module, BaseTunerLayer)


def _fold(tuner: Any, layers: list[Any], kept: dict[nn.Parameter, torch.Tensor]) -> bool:
    """Have peft fold into copies of the weights; put all back and say no where it cannot."""
    for parameter, before in kept.items():
        parameter.data = before.clone()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of tied weights, which are left alone here
            tuner.merge_adapter(safe_merge=True)
    except _FAILURES:
        _unfold(tuner, layers, kept)
        return False
    return True


def _unfold(tuner: Any, layers: list[Any], kept: dict[nn.Parameter, torch.Tensor]) -> None:
    """Have peft undo what it keeps beside the weights, and put the weights back whatever it can undo."""
    try:
        if any(layer.merged_adapters for layer in layers):
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of layers that were not reached
                tuner.unmerge_adapter()
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, before in kept.items():
            parameter.data = before
