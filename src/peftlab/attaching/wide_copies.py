"""What trains beside a base in half precision: kept in float32, used in the base's dtype.

Next to a weight of 1, bfloat16 has no number between 1 and 1.008: AdamW steps of 2e-4 leave four fifths of such a weight
where it was. So a copy's tensors are float32, as peft's A and B are; what trains, is saved and is loaded are these. What
the module computes with is their rounding to the base's dtype, made anew whenever it reads them: the copy answers at
the start bit for bit as its original does, in the same dtype and at the same speed, and once merged, rounded once and
for all, as it did before.

peft's A and B of LoRA are read in the same way: left in float32, they would pull all that a layer reads up to float32 and
its answer down again.

A module reads a tensor as an attribute. Its class is exchanged for a subclass where these attributes are properties, as
`torch.nn.utils.parametrize` does it, but with names and `state_dict` as they were. The rounding costs a forward pass one
half-precision copy of the tensors.

Source: weights kept in float32 and used in half precision, Micikevicius et al. 2018, Mixed Precision Training,
arXiv 1710.03740, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

_HALF = (torch.float16, torch.bfloat16)
_KIND, _DTYPES, _WHOLE = "_class_of_original", "_dtypes_of_original", "_read_whole"
_LOW_RANK = ("lora_A", "lora_B")


def widen(copied: nn.Module) -> None:
    """Keep the half-precision parameters of a trained copy in float32; the parameters stay the same objects.

    Args:
        copied: A copy of a module of the base; tied copies share their parameters already. Widened once more, or without
            parameters in half precision, it stays as it is.
    """
    for module in copied.modules():
        if _DTYPES in vars(module):  # the copy of a widened module is one
            continue
        dtypes = {
            name: _half_dtype(p) for name, p in module._parameters.items() if p is not None and _is_half(p)
        }
        if dtypes:
            _read_rounded(module, dtypes)
    for parameter in copied.parameters():
        if parameter.dtype in _HALF:
            vars(parameter)[_DTYPES] = parameter.dtype  # another copy may share it
            parameter.data = parameter.data.float()


def widen_copies(model: nn.Module, adapter: str) -> None:
    """Widen what peft has copied to be trained whole.

    Args:
        model: A model with adapters of peft.
        adapter: The name of the adapter inside peft.
    """
    for module in model.modules():
        copies = vars(module)["_modules"].get("modules_to_save")
        if isinstance(copies, nn.ModuleDict) and adapter in copies:
            widen(copies[adapter])


def read_low_rank_rounded(model: nn.Module, adapter: str) -> None:
    """Have LoRA's A and B, stored in float32, read in the half precision of the layer that they stand beside.

    DoRA and its like, which divide by norms of the whole weight, stay as peft has them.

    Args:
        model: A model with adapters of peft.
        adapter: The name of the adapter inside peft.
    """
    for module in model.modules():
        layer: Any = module
        parts = [vars(layer).get("_modules", {}).get(name) for name in _LOW_RANK]
        if not all(isinstance(part, nn.ModuleDict) and adapter in part for part in parts):
            continue
        weight = getattr(layer.get_base_layer(), "weight", None)
        if adapter in getattr(layer, "lora_variant", {}) or weight is None or weight.dtype not in _HALF:
            continue
        for part in parts:
            wide = {n: weight.dtype for n, p in part[adapter]._parameters.items() if _is_single(p)}
            if wide and _DTYPES not in vars(part[adapter]):
                _read_rounded(part[adapter], wide)


@contextmanager
def read_whole(model: nn.Module) -> Iterator[None]:
    """A context in which what is kept in float32 is read in float32: for merging, where it is rounded once.

    Args:
        model: A module with such parts in it; where there are none, nothing changes.
    """
    rounded = [module for module in model.modules() if _DTYPES in vars(module)]
    for module in rounded:
        vars(module)[_WHOLE] = True
    try:
        yield
    finally:
        for module in rounded:
            vars(module).pop(_WHOLE, None)


def narrow(model: nn.Module) -> None:
    """Make widened copies plain modules of the base: their parameters take its dtypes, rounded once.

    Args:
        model: A module with widened copies in it, or one itself; where there are none, nothing changes.
    """
    for module in model.modules():
        dtypes = vars(module).pop(_DTYPES, None)
        if dtypes is None:
            continue
        kind: Any = type(module)
        module.__class__ = getattr(kind, _KIND)
        for name, dtype in dtypes.items():
            parameter = module._parameters[name]
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
                vars(parameter).pop(_DTYPES, None)


def _read_rounded(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Have a module read some of its parameters in other dtypes."""
    kind: Any = type(module)
    vars(module)[_DTYPES] = dtypes
    module.__class__ = _reading_rounded(kind, tuple(dtypes))


def _is_single(parameter: nn.Parameter | None) -> bool:
    """Whether there is a parameter, in float32."""
    return parameter is not None and parameter.dtype == torch.float32


def _is_half(parameter: nn.Parameter) -> bool:
    """Whether a parameter is of half precision, or was until another copy that shares it was widened."""
    return parameter.dtype in _HALF or _DTYPES in vars(parameter)


def _half_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The half-precision dtype that a parameter has, or had."""
    found: torch.dtype = vars(parameter).get(_DTYPES, parameter.dtype)
    return found


@cache
def _reading_rounded(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module's class, of the same name, which reads some parameters in the base's dtypes.

    Args:
        kind: The class.
        names: The parameters.
    """

    def rounded(name: str) -> property:
        def read(module: nn.Module) -> torch.Tensor | None:
            parameter = module._parameters[name]
            if parameter is None or _WHOLE in vars(module):
                return parameter
            return parameter.to(vars(module)[_DTYPES][name])

        return property(read)

    def plain(module: nn.Module) -> nn.Module:
        beneath = kind.__new__(kind)
        vars(beneath).update(vars(module))
        return beneath

    own = {name: rounded(name) for name in names}
    # get_base_layer: as peft's layers have it, for who compares the classes of a model with those of a plain one
    more = {"__module__": kind.__module__, "get_base_layer": plain, _KIND: kind}
    return type(kind.__name__, (kind,), more | own)
