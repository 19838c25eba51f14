"""The map of a model as it is drawn: stacks, the kinds of blocks in them, and the parts of a block in the order they run.

The family map says what each part is and what its output means; the order, and which parts read the block's own input
side by side, are seen on the tiny twin that the certificate was made with.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlab.certificate import BlockKind
from peftlab.family import FamilyMap, Site
from peftlab.mapping.certifying import family_exceptions, prove_config
from peftlab.mapping.structure import block_lists, signature, unwrap
from peftlab.mapping.trace import Call, equal, record
from peftlab.mapping.twin import twin_inputs

_CONTAINERS = ("attention", "cross_attention", "mlp")
"""Roles of parts that hold layers; each is also the name of a part in the drawing."""


@dataclass(frozen=True, slots=True)
class RunningOrder:
    """What one pass of a block shows.

    Attributes:
        paths: Paths of its modules in the block, in the order they finish.
        side_by_side: Paths of parts, the first apart, that read the block's own input.
    """

    paths: tuple[str, ...]
    side_by_side: frozenset[str] = frozenset()


def describe_map(model: nn.Module, family: FamilyMap) -> dict[str, Any]:
    """A model's map as plain values.

    Args:
        model: The model, on any device, bare or wrapped by peft.
        family: Its map.

    Returns:
        "embeddings", "stacks", "after" (what lies outside the stacks: norms, poolers) and "head". A stack has its facts and
        "kinds": blocks that are drawn alike, with their layers and their parts in the order they run.
    """
    orders = _running_orders(model, family)
    outside = [_outer(model, site) for site in _each_once(model, family)]
    return {
        "embeddings": [part for part in outside if part["role"].startswith("embedding")],
        "stacks": [_describe_stack(model, family, stack, orders) for stack in family.stacks],
        "after": [part for part in outside if part["role"] in ("norm", "other")],
        "head": next((part for part in outside if part["role"] == "head"), None),
        "tied": family.tied,
    }


def _each_once(model: nn.Module, family: FamilyMap) -> Iterator[Site]:
    """The sites outside the blocks; of embeddings that share one weight (T5's) the first."""
    seen: set[int] = set()
    for site in family.sites:
        weight = getattr(unwrap(model.get_submodule(site.path)), "weight", None)
        if site.layer is None and not (site.role == "embedding.other" and id(weight) in seen):
            yield site
        if site.layer is None and weight is not None:
            seen.add(id(weight))


def _outer(model: nn.Module, site: Site) -> dict[str, Any]:
    """One module outside the blocks."""
    module = unwrap(model.get_submodule(site.path))
    sizes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
    return {
        "path": site.path,
        "role": site.role,
        "size": max(([*size] for size in sizes), key=len, default=[]),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "adapted": _adapted(model.get_submodule(site.path)),
    }


def _describe_stack(
    model: nn.Module, family: FamilyMap, stack: str, orders: Mapping[str, RunningOrder]
) -> dict[str, Any]:
    """One stack of blocks."""
    proof = family.proofs.get(stack)
    blocks = family.blocks(stack)
    alike: dict[str, dict[str, Any]] = {}
    for block in blocks:
        mark = signature(model.get_submodule(block.path))
        kind = proof.kind(mark) if proof else None
        order = orders.get(mark)
        parts = list(_parts(model, family, block, kind or BlockKind(mark), order))
        drawn = {"parts": parts, "causal": kind.causal if kind else None, "proved": kind is not None}
        alike.setdefault(json.dumps(drawn), {"layers": [], **drawn, "ordered": order is not None})[
            "layers"
        ].append(block.layer)
    return {
        "name": stack,
        "path": blocks[0].path.rpartition(".")[0],
        "num_layers": family.num_outputs(stack),
        "num_blocks": len(blocks),
        "order": list(family.order(stack)),
        "layout": family.layout(stack),
        "outputs": proof.outputs if proof else "not run",
        "final_norm": proof.final_norm if proof else None,
        "kinds": list(alike.values()),
    }


def _parts(
    model: nn.Module, family: FamilyMap, block: Site, kind: BlockKind, order: RunningOrder | None
) -> Iterator[dict[str, Any]]:
    """The parts of one block: norms, and boxes of layers that work together.

    Norms between two layers of one box belong to it (those on queries and keys), the others stand between the boxes.
    """
    inside = {
        site.path[len(block.path) + 1 :]: site
        for site in family.sites
        if site.stack == block.stack and site.layer == block.layer and site.role != "block"
    }
    box: dict[str, Any] | None = None
    held: list[dict[str, Any]] = []  # norms that ran since the last layer
    for path in _in_order(inside, order):
        site = inside[path]
        if site.role == "norm":
            held.append({"kind": "norm", "path": path})
            continue
        key = _box_of(path, site, inside)
        if box is None or box["key"] != key:
            if box is not None:
                yield _finished(box, kind, order)
            yield from held
            box = {"kind": key[0], "key": key, "layers": []}
        else:
            box["layers"] += [{"role": "norm", "path": norm["path"]} for norm in held]
        held = []
        if site.role not in _CONTAINERS:
            box["layers"].append(_layer(model, path, site))
    if box is not None:
        yield _finished(box, kind, order)
    yield from held


def _in_order(inside: Mapping[str, Site], order: RunningOrder | None) -> list[str]:
    """Paths to draw, in the order they run; containers only where no layer of theirs is drawn."""
    drawn = [
        path
        for path, site in inside.items()
        if site.role not in _CONTAINERS
        or not any(other.startswith(f"{path}.") and inside[other].role != "norm" for other in inside)
    ]
    if order is None:
        return drawn
    place = {path: number for number, path in enumerate(order.paths)}

    def when(path: str) -> int:
        """When a module, or the nearest around it that is called, finishes."""
        while path and path not in place:
            path = path.rpartition(".")[0]
        return place.get(path, len(place))

    return sorted(drawn, key=when)


def _box_of(path: str, site: Site, inside: Mapping[str, Site]) -> tuple[str, str]:
    """The box that a layer is drawn in: what it is, and for attention which."""
    around = [
        p for p, s in inside.items() if s.role in _CONTAINERS and (p == path or path.startswith(f"{p}."))
    ]
    holder = max(around, key=len, default="")
    role = inside[holder].role if holder else site.role.rpartition(".")[0]
    if role not in _CONTAINERS:
        return "other", path.rpartition(".")[0]
    return role, "" if role == "mlp" else holder


def _layer(model: nn.Module, path: str, site: Site) -> dict[str, Any]:
    """One layer in a box."""
    module = model.get_submodule(site.path)
    layer: dict[str, Any] = {"role": site.role.rpartition(".")[2], "path": path}
    if site.linear:
        layer |= {"in": site.in_features, "out": site.out_features}
    else:
        sizes = [tuple(p.shape) for p in unwrap(module).parameters()]
        layer["sizes"] = [list(size) for size in sizes if len(size) > 1]
    adapted = _adapted(module)
    return layer | ({"adapted": adapted} if adapted else {})


def _finished(box: dict[str, Any], kind: BlockKind, order: RunningOrder | None) -> dict[str, Any]:
    """A box with what is proved about the part, or the last of the parts, that it stands for."""
    paths = [layer["path"] for layer in box["layers"]] or [box["key"][1]]
    parts = [part for part in kind.residual if any(p == part or p.startswith(f"{part}.") for p in paths)]
    last = next((p for p in reversed(parts) if paths[-1] == p or paths[-1].startswith(f"{p}.")), None)
    return {
        "kind": box["kind"],
        "path": box["key"][1] or (parts[0] if parts else paths[0]),
        "layers": box["layers"],
        "residual": kind.residual[last] if last is not None else None,
        "side_by_side": order is not None and any(part in order.side_by_side for part in parts),
    }


def _adapted(module: nn.Module) -> str | None:
    """What peft put around a module, in words; None where it put nothing."""
    ranks = getattr(module, "r", None)
    if isinstance(getattr(module, "original_module", None), nn.Module):
        return "trained whole"
    if not isinstance(getattr(module, "base_layer", None), nn.Module):
        return None
    tuner = type(module).__module__.split("tuners.")[-1].split(".")[0].replace("_", " ")
    rank = next(iter(ranks.values()), None) if isinstance(ranks, Mapping) else None
    return tuner if rank is None else f"{tuner}, rank {rank}"


# -- the twin -----------------------------------------------------------------------------------------------------


def _running_orders(model: nn.Module, family: FamilyMap) -> dict[str, RunningOrder]:
    """The running order of every make of block, by signature; empty where no twin runs (the certificate says why)."""
    from transformers import PreTrainedModel

    orders: dict[str, RunningOrder] = {}
    cores = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    proved = {certificate.model_class for certificate in family.certificates if not certificate.problem}
    for core in cores[:1] if type(cores[0]).__name__ in proved else ():
        twin, _, _ = prove_config(type(core), copy.deepcopy(core.config))
        if twin is None:
            continue
        inputs = twin_inputs(twin)
        adapt = getattr(family_exceptions(core.config.model_type), "inputs", None)
        calls, _ = record(twin, adapt(twin, inputs) if adapt else inputs)
        for path, blocks in block_lists(twin).items():
            kinds = {kind.signature: kind for p in family.proofs.values() for kind in p.kinds}
            for number, block in enumerate(blocks):
                mark = signature(block)
                if mark in kinds and f"{path}.{number}" in calls:
                    orders.setdefault(mark, _order(f"{path}.{number}", calls, kinds[mark]))
    return orders


def _order(block: str, calls: Mapping[str, Sequence[Call]], kind: BlockKind) -> RunningOrder:
    """The running order of one block of the twin."""
    own = {path[len(block) + 1 :]: made[0] for path, made in calls.items() if path.startswith(f"{block}.")}
    stream = calls[block][0].hidden
    parts = [path for path in own if path in kind.residual]
    normed = [
        own[p].result for p, part in kind.parts.items() if part == "norm" and equal(own[p].hidden, stream)
    ]
    reads = [p for p in parts if any(equal(own[p].hidden, source) for source in (stream, *normed))]
    return RunningOrder(tuple(own), frozenset(reads[1:] if reads[:1] == parts[:1] else ()))
