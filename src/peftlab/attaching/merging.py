"""Folding an adapter of peft into the weights it stands beside: all of it, or nothing.

peft's layers do the arithmetic (`merge`, with its check for values that are not finite) and `unload` takes them off.
peft 0.21 merges layer by layer and stops where one fails, with the layers before it changed; rounds the update to the dtype
of a half-precision base before it adds it; and writes through a weight that a second module uses. Here the first is undone,
the second is added in float32 and rounded once, and the third is refused.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1 ("no additional inference latency"); peft `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftlab.attaching.wide_copies import read_whole
from peftlab.errors import MethodError, NonFiniteError

_HALF = (torch.float16, torch.bfloat16)
_MOST_LOST = 0.5
"""Share of an update that rounding may take, in the norm over all weights; rounding to nearest takes all of it at worst."""
_KEEP = "keep it beside the base (save), or take it off (remove)"


def check_not_over(ended: str, wanted: str) -> None:
    """Refuse what an adapter that is no longer on its base is asked for.

    Args:
        ended: How it ended: "merged", "removed", or "" while it is on its base.
        wanted: What is asked for: "merged", "removed" or "switched off".

    Raises:
        MethodError: It has ended.
    """
    if ended == "merged":
        raise MethodError(
            f"this adapter has been merged: its effect is in the base's own weights and it can not be {wanted} any more;"
            " load the base anew to have it as it was"
        )
    if ended and ended != wanted:
        raise MethodError(
            f"this adapter has been {ended}: there is nothing to be {wanted}; attach it again and load what was saved"
        )


def fold(model: Any, name: str) -> nn.Module:
    """Fold a peft adapter into the base's weights and take it off.

    Args:
        model: The model that peft made, one adapter active.
        name: The method's name, for messages.

    Returns:
        The base. Its answers in evaluation mode are the adapted model's, to rounding: about 1e-6 of the logits in float32; a
        base in half precision is added up in float32 and rounded once.

    Raises:
        MethodError: peft cannot merge this, a weight belongs to another module too, or rounding to the base's dtype would
            take half of what the adapter adds. The adapter is on the base as before.
        NonFiniteError: A value is not finite, of the adapter or of the sum. The adapter is on the base as before.
    """
    tuner = model.base_model
    if not hasattr(type(tuner), "merge_and_unload"):
        raise MethodError(f"peft cannot merge {name} into the weights of a base: {_KEEP}")
    bad = next((n for n, p in model.named_parameters() if not torch.isfinite(p.detach()).all()), None)
    if bad is not None:
        raise NonFiniteError(f"{bad} has values that are not finite: the adapter is not merged")
    layers = {path: m for path, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer)}
    _refuse_shared(tuner.model, layers)
    with _undone_on_failure(layers), torch.no_grad():
        _fold_layers(tuner, layers, name)
    _put_trained_copies(tuner.model)
    base: nn.Module = tuner.unload()
    return base


def _fold_layers(tuner: Any, layers: dict[str, Any], name: str) -> None:
    """Have each layer of peft merge, half precision in float32; refuse what rounding would take away.

    Raises:
        MethodError: peft cannot merge a layer, or rounding takes half of the update.
        NonFiniteError: A sum is not finite.
    """
    added = lost = 0.0
    for path, layer in layers.items():
        half = {p: p.detach().clone() for p in _own_parameters(layer) if p.dtype in _HALF}
        for parameter, before in half.items():
            parameter.data = before.float()
        try:
            with warnings.catch_warnings(), read_whole(layer):
                warnings.simplefilter("ignore")  # of tied weights, which are refused here, and of rounding
                tuner._check_merge_allowed()
                layer.merge(safe_merge=True)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "NaNs detected" in line:
                raise NonFiniteError(
                    f"the weight of '{path}' would not be finite: {name} is not merged"
                ) from error
            raise MethodError(f"peft cannot merge {name} into '{path}' ({line}): {_KEEP}") from error
        for parameter, before in half.items():
            exact = parameter.detach()
            rounded = exact.to(before.dtype)
            added += float((exact - before.float()).square().sum())
            lost += float((exact - rounded.float()).square().sum())
            parameter.data = rounded
        if not all(bool(torch.isfinite(p).all()) for p in _own_parameters(layer)):
            raise NonFiniteError(f"the weight of '{path}' would not be finite: {name} is not merged")
    share = (lost / added) ** 0.5 if added else 0.0
    if share > _MOST_LOST:
        raise MethodError(
            f"rounded to the base's half precision, the merged weights would miss {share:.0%} of what {name} adds to them;"
            " load the base with model.dtype=float32 and merge there"
        )


def _own_parameters(layer: Any) -> list[nn.Parameter]:
    """The parameters of the base's module that a layer of peft stands beside."""
    base: nn.Module = layer.get_base_layer()
    return [p for module in base.modules() if not isinstance(module, BaseTunerLayer) for p in module._parameters.values()
            if p is not None and p.is_floating_point()]  # fmt: skip


def _refuse_shared(model: nn.Module, layers: dict[str, Any]) -> None:
    """Refuse to fold into a weight that another module uses: it would change there too.

    Raises:
        MethodError: There is one.
    """
    users: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {})[id(module)] = path.replace(".base_layer", "")
    for path, layer in layers.items():
        for parameter in layer.get_base_layer()._parameters.values():
            names = sorted(users.get(id(parameter), {}).values())
            if len(names) > 1:
                raise MethodError(
                    f"the weight of '{path}' is tied: {', '.join(names)} share it, and what is merged into one would change"
                    f" the other; untie them (tie_word_embeddings=False), or {_KEEP}"
                )


def _put_trained_copies(model: nn.Module) -> None:
    """Put modules that were trained whole where their originals were, in their dtypes: peft's IA3 cannot, of a head."""
    for path, module in list(model.named_modules()):
        original = getattr(module, "original_module", None)
        copies = getattr(module, "modules_to_save", None)
        if not isinstance(original, nn.Module) or not isinstance(copies, nn.ModuleDict):
            continue
        trained: Any = copies[module.active_adapters[0]]
        dtypes = {name: p.dtype for name, p in original.named_parameters()}
        for name, parameter in trained.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, trained)


@contextmanager
def _undone_on_failure(layers: dict[str, Any]) -> Iterator[None]:
    """Put weights back where merging fails half-way; until then they are kept in host memory, once more what is adapted."""
    kept = {p: p.detach().to("cpu", copy=True) for layer in layers.values() for p in _own_parameters(layer)}
    try:
        yield
    except Exception:
        for parameter, before in kept.items():
            parameter.data = before.to(parameter.device)
        for layer in layers.values():
            layer.merged_adapters.clear()
        raise
