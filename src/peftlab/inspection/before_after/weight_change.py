"""How far the weights have moved, module by module, and which singular vectors the tuned weight has of its own.

LoRA's change s B A is never built: with B = Q_B R_B and A^T = Q_A R_A its singular values are those of s R_B R_A^T, which is
rank x rank. Every other kind of adapter is merged, by peft, into a copy of the one module, and the change is what that copy
has more; tensors that were trained themselves are held against their originals. What peft cannot merge is named.

Intruder dimensions are built of the whole weight: among the k leading left singular vectors of W + dW those whose cosine
with every left singular vector of W is below epsilon.

Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, algorithm 1;
k and epsilon as in peft `tuners/lora/intruders.py`. Effective rank: Roy and Vetterli 2007, exp of the entropy of the
singular values over their sum. Stable rank: ||dW||_F^2 / ||dW||_2^2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftlab.family import FamilyMap
from peftlab.method import Attachment

TOP_VECTORS, CLOSE = 10, 0.5
"""k and epsilon of intruder dimensions."""
MOST_WORK = 2**31
"""Rows x columns x the smaller of both, above which a module's exact singular vectors are not computed."""
_MOST_WORK_IN_ALL = 2**36


@dataclass(slots=True)
class WeightChange:
    """How far one module's weight has moved.

    Attributes:
        path: The module in the tuned model.
        role: Its role in the map.
        stack: Its stack; "" outside.
        layer: Its layer; None outside.
        kind: "low rank" (from A and B), "merged" (by peft, on a copy), "trained" (against the original), "trained whole"
            (a copy beside the original).
        shape: Of the weight as it is stored.
        rank: Of A and B; None for other kinds.
        norm: ||dW||_F.
        ratio: ||dW||_F / ||W||_F; None where W cannot be read or is zero.
        spectral_norm: The largest singular value.
        stable_rank: ||dW||_F^2 / ||dW||_2^2; None where nothing has changed.
        effective_rank: exp of the entropy of the singular values; None where nothing has changed.
        intruders: How many of the k leading singular vectors of the tuned weight are new.
        closest: The least, over those k, of the largest cosine with a singular vector of the base's weight.
        notes: What was not computed, and why.
    """

    path: str
    role: str
    stack: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]
    rank: int | None = None
    norm: float | None = None
    ratio: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    intruders: int | None = None
    closest: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Moved:
    """One module's weight before and after; only what its kind has."""

    kind: str
    path: str
    weight: torch.Tensor | None
    factors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    change: torch.Tensor | None = None
    is_transposed: bool = False
    refused: str = ""


def weight_changes(
    attachment: Attachment, family: FamilyMap, *, added: Mapping[str, tuple[int, ...]] | None = None
) -> list[WeightChange]:
    """How far every adapted or trained module has moved.

    Args:
        attachment: The adapter, with weights; nothing in it is changed.
        family: The map of the tuned model.
        added: Stack to layers that the base does not have; their weights have not moved from anywhere.

    Returns:
        One entry for each, in the model's order; embeddings and heads trained whole among them.
    """
    found: list[WeightChange] = []
    left = _MOST_WORK_IN_ALL
    for moved in _moved(attachment):
        site = family.locate(f"{moved.path}.weight")
        if site.layer in (added or {}).get(site.stack, ()):
            continue
        shape = tuple(moved.weight.shape) if moved.weight is not None else ()
        change = WeightChange(moved.path, site.role, site.stack, site.layer, moved.kind, shape)
        found.append(change)
        if moved.refused:
            change.notes.append(moved.refused)
            continue
        left = _measure(change, moved, left)
    return found


def low_rank_singular_values(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The singular values of s B A without building it.

    Args:
        a: (rank, in).
        b: (out, rank).
        scale: s.

    Returns:
        At most rank of them, the largest first, float64; the others are zero.
    """
    inner_b = torch.linalg.qr(b.double(), mode="r").R
    inner_a = torch.linalg.qr(a.double().T, mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(inner_b @ inner_a.T) * abs(scale)
    return values


def spread(singular_values: torch.Tensor) -> dict[str, float | None]:
    """What singular values say of a change.

    Args:
        singular_values: Of the change, zeros may be left out.

    Returns:
        norm, spectral_norm, stable_rank, effective_rank; the ranks None where all are zero.
    """
    values = singular_values.double()
    norm, largest = float(values.norm()), float(values.max()) if len(values) else 0.0
    ranks: dict[str, float | None] = {"stable_rank": None, "effective_rank": None}
    if largest > 0:
        shares = values / values.sum()
        ranks["stable_rank"] = (norm / largest) ** 2
        ranks["effective_rank"] = float(torch.special.entr(shares).sum().exp())
    return {"norm": norm, "spectral_norm": largest, **ranks}


def intruder_dimensions(
    base: torch.Tensor, tuned: torch.Tensor, *, top: int = TOP_VECTORS, close: float = CLOSE
) -> tuple[int, float]:
    """Leading left singular vectors of the tuned weight that the base's weight does not have.

    Args:
        base: W, (out, in).
        tuned: W + dW, (out, in).
        top: k.
        close: Epsilon, the cosine below which a vector is new.

    Returns:
        How many, and the least of their largest cosines.
    """
    before, after = _left_vectors(base), _left_vectors(tuned)[:, :top]
    nearest = (after.T @ before).abs().amax(dim=1)
    return int((nearest < close).sum()), float(nearest.min())


def _left_vectors(weight: torch.Tensor) -> torch.Tensor:
    """The left singular vectors as columns, the leading ones first: eigenvectors of the smaller Gram matrix, in float64.

    The vectors of singular values below 1e-7 of the largest are nobody's and left out. On two cores this takes a tenth of
    the time of an SVD in float32.
    """
    exact = weight.double()
    is_wide = exact.shape[0] <= exact.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if is_wide else exact.T @ exact)
    kept = (squares > 1e-14 * squares[-1]).flip(0)
    squares, vectors = squares.flip(0)[kept], vectors.flip(1)[:, kept]
    left: torch.Tensor = vectors if is_wide else exact @ vectors / squares.sqrt()
    return left


def _singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The singular values, the largest first, to 1e-7 of the largest: of the smaller Gram matrix, in float64."""
    exact = matrix.double()
    gram = exact @ exact.T if exact.shape[0] <= exact.shape[1] else exact.T @ exact
    squares: torch.Tensor = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    return squares.sqrt().flip(0)


# -- what has moved -----------------------------------------------------------------------------------------------


def _moved(attachment: Attachment) -> Iterator[_Moved]:
    """Every module whose weight has moved; one at a time, so that one copy is held at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    model: Any = attachment.model
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield from (_adapted(path, module, name) for name in _names(module))
        elif isinstance(module, ModulesToSaveWrapper):
            for name in module.active_adapters:
                if name in module.modules_to_save:
                    yield from _whole(path, module, module.modules_to_save[name])
    yield from _rewritten(attachment)


def _names(layer: Any) -> list[str]:
    """The active adapters that a layer has tensors of."""
    there = {key for kind in layer.adapter_layer_names for key in getattr(layer, kind, {})}
    return [name for name in layer.active_adapters if name in there]


def _adapted(path: str, layer: Any, name: str) -> _Moved:
    """The change of one layer of peft's."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    weight = weight.detach() if isinstance(weight, torch.Tensor) else None
    is_transposed = bool(getattr(layer, "fan_in_fan_out", False))
    kind = type(layer).__module__
    if not kind.startswith("peft.tuners.lora."):
        return _merged(path, layer, name, weight, is_transposed=is_transposed)
    plain = name not in getattr(layer, "lora_variant", {}) and weight is not None and weight.dim() == 2
    if plain and name in layer.lora_A and type(layer).__name__ != "ParamWrapper":
        a, b = (side[name] for side in (layer.lora_A, layer.lora_B))
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear) and b.bias is None:
            factors = (a.weight.detach(), b.weight.detach(), float(layer.scaling[name]))
            return _Moved("low rank", path, weight, factors, is_transposed=is_transposed)
    if plain and name in layer.lora_embedding_A:  # an embedding is stored as (num, dim)
        a, b = layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach()
        return _Moved("low rank", path, weight, (a, b, float(layer.scaling[name])), is_transposed=True)
    return _merged(path, layer, name, weight, is_transposed=is_transposed)


def _merged(path: str, layer: Any, name: str, weight: torch.Tensor | None, *, is_transposed: bool) -> _Moved:
    """The change that peft makes where it merges an adapter, tried on a copy of the layer."""
    moved = _Moved("merged", path, weight, is_transposed=is_transposed)
    if weight is None or not weight.is_floating_point():
        what = (
            "a quantised weight"
            if weight is not None
            else "a parameter that is no module's weight, as experts' are"
        )
        moved.refused = f"not computed: {type(layer).__name__} of peft stands on {what}"
        return moved
    try:
        with torch.no_grad():
            copied = copy.deepcopy(layer)
            copied.merge(adapter_names=[name])
            moved.change = copied.get_base_layer().weight.detach() - weight.detach()
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        moved.refused = f"peft does not merge its {type(layer).__name__} here: {error}"
    return moved


def _whole(path: str, wrapper: Any, trained: nn.Module) -> Iterator[_Moved]:
    """The changes of a module that peft trains whole beside the original."""
    originals = dict(wrapper.original_module.named_parameters())
    for name, parameter in trained.named_parameters():
        where = f"{path}.{name.rpartition('.')[0]}".rstrip(".")
        original = originals.get(name)
        if parameter.dim() < 2 or original is None or original.shape != parameter.shape:
            continue
        yield _Moved(
            "trained whole",
            where,
            original.detach(),
            change=(parameter - original).detach(),
            is_transposed=False,
        )


def _rewritten(attachment: Attachment) -> Iterator[_Moved]:
    """The changes of the base's own tensors; vectors (biases, gains) with their norms alone."""
    if not attachment.rewritten:
        return
    own = dict(attachment.model.named_parameters())
    paths = dict(attachment.model.named_modules())
    for name in attachment.rewritten:
        live = name if name in own else next((n for n in own if n.endswith(f".{name}")), "")
        if not live:
            continue
        trained = own[live].data
        with attachment.disabled():
            original = own[live].data
        if trained.data_ptr() == original.data_ptr():
            continue
        where, _, what = live.rpartition(".")
        kind = type(paths[where]).__name__
        path = where if what == "weight" else live
        yield _Moved(
            "trained",
            path,
            original,
            change=trained - original,
            is_transposed=kind in ("Conv1D", "Embedding"),
        )


# -- what it comes to ---------------------------------------------------------------------------------------------


def _measure(change: WeightChange, moved: _Moved, left: int) -> int:
    """Fill in the numbers; returns what is left of the work for exact singular vectors."""
    if moved.weight is None:
        change.notes.append("the base's weight cannot be read as numbers")
    work = _work(moved.weight)
    affordable = 0 < work <= min(MOST_WORK, left)
    numbers: dict[str, float | None] = {}
    if moved.factors is not None:
        change.rank = moved.factors[0].shape[0]
        numbers = spread(low_rank_singular_values(*moved.factors))
    elif moved.change is not None and affordable:
        left -= work
        numbers = spread(_singular_values(moved.change.detach()))
    elif moved.change is not None:
        precise = torch.promote_types(moved.change.dtype, torch.float32)
        numbers = {"norm": float(torch.linalg.vector_norm(moved.change, dtype=precise))}
        if moved.change.dim() > 1:
            change.notes.append(f"singular values: {_too_much(moved.weight, left)}")
    for name, value in numbers.items():
        setattr(change, name, value)
    if moved.weight is None or not moved.weight.is_floating_point():
        return left
    precise = torch.promote_types(moved.weight.dtype, torch.float32)
    length = float(torch.linalg.vector_norm(moved.weight, dtype=precise))
    change.ratio = change.norm / length if length > 0 and change.norm is not None else None
    if moved.weight.dim() < 2:
        return left
    if not 0 < work <= min(MOST_WORK, left):
        change.notes.append(f"intruder dimensions: {_too_much(moved.weight, left)}")
        return left
    if not change.norm:
        change.notes.append("intruder dimensions: the weight has not moved")
        return left
    base, delta = _precise(moved.weight), _delta(moved)
    if moved.is_transposed:
        base, delta = base.T, delta.T
    change.intruders, change.closest = intruder_dimensions(base, base + delta)
    return left - work


def _delta(moved: _Moved) -> torch.Tensor:
    """The change as a whole, in the shape that the weight is stored in; built for a weight of bounded size alone."""
    if moved.factors is None:
        assert moved.change is not None
        return _precise(moved.change)
    a, b, scale = moved.factors
    built = _precise(b) @ _precise(a) * scale
    return built.T if moved.is_transposed else built


def _work(weight: torch.Tensor | None) -> int:
    """What an exact decomposition of a weight costs; 0 where there is none."""
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return 0
    return weight.numel() * min(weight.shape)


def _too_much(weight: torch.Tensor | None, left: int) -> str:
    """Why a weight's exact singular vectors are not computed."""
    if weight is not None and weight.dim() != 2:
        return f"not computed for a tensor of {weight.dim()} axes"
    work = _work(weight)
    if not work:
        return "not computed for a weight that is not kept as numbers"
    size = " x ".join(map(str, weight.shape if weight is not None else ()))
    if work > MOST_WORK:
        return f"not computed, {size} is above the bound of {MOST_WORK:,} (rows x columns x the smaller)"
    return f"not computed, the modules before it took all of the work that is allowed ({_MOST_WORK_IN_ALL:,})"


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least, without gradient."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
