"""Proving the map of an architecture on a twin: every experiment on every make of block, as one certificate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

from peftlab.attention_interface import AttentionCall, observed_attention
from peftlab.certificate import BlockKind, Certificate, StackProof
from peftlab.mapping.attribution import Bench, attribute_mixer, attribute_mlp
from peftlab.mapping.outputs import (
    compare_head,
    compare_outputs,
    find_final_norm,
    hidden_states_of,
    residual_of,
)
from peftlab.mapping.parts import Parts, find_parts
from peftlab.mapping.positions import Shape
from peftlab.mapping.structure import (
    block_lists,
    inner_modules,
    is_linear,
    is_vectors_only,
    output_head,
    signature,
)
from peftlab.mapping.trace import Call, equal, record
from peftlab.mapping.twin import ROWS


def prove(twin: Any, inputs: Mapping[str, torch.Tensor]) -> Certificate:
    """Carry out all experiments on a twin.

    Args:
        twin: A tiny model.
        inputs: What its forward takes.

    Returns:
        The certificate.
    """
    began = time.perf_counter()
    seen: list[AttentionCall] = []
    calls, output = record(twin, inputs, output_hidden_states=True)
    with observed_attention(twin, seen.append):
        stacks = tuple(
            _prove_stack(twin, path, blocks, calls, output, seen)
            for path, blocks in block_lists(twin).items()
        )
    return Certificate(
        model_class=type(twin).__name__,
        model_type=getattr(twin.config, "model_type", ""),
        versions={name: metadata.version(name) for name in ("transformers", "torch")},
        stacks=stacks,
        head=_prove_head(twin, calls, output),
        seconds=round(time.perf_counter() - began, 3),
    )


def _prove_stack(
    twin: nn.Module,
    path: str,
    blocks: list[nn.Module],
    calls: Mapping[str, list[Call]],
    output: Any,
    seen: list[AttentionCall],
) -> StackProof:
    """All experiments on one stack."""
    paths = [f"{path}.{i}" for i in range(len(blocks))]
    made = sorted((call.turn, i, call) for i, p in enumerate(paths) for call in calls.get(p, ()))
    if not made:
        return StackProof(path)
    runs = [call for _, _, call in made]
    order = tuple(i for _, i, _ in made)
    outputs = [call.result for call in runs]
    outside = [p for p, m in twin.named_modules() if _may_be_norm(m) and not p.startswith(f"{path}.")]
    norm = find_final_norm(outputs[-1], calls, outside)
    behind = [
        call.result
        for p, own_calls in calls.items()
        for call in own_calls
        if not p.startswith(f"{path}.") and call.result is not None and equal(call.hidden, outputs[-1])
    ]
    verdict, layout = compare_outputs(
        outputs, hidden_states_of(output), behind, num_stacks=len(block_lists(twin))
    )
    fed = _lengths_of_others(path, calls)
    kinds: dict[str, BlockKind] = {}
    for block, block_path in zip(blocks, paths, strict=True):
        own = {p[len(block_path) + 1 :]: c[0] for p, c in calls.items() if p.startswith(f"{block_path}.")}
        mark = signature(block)
        if mark not in kinds and block_path in calls:
            kinds[mark] = _prove_kind(block, calls[block_path][0], own, seen, mark, fed)
    shared = len(set(order)) < len(order)
    return StackProof(path, layout, verdict, order if shared else (), norm, tuple(kinds.values()))


def _lengths_of_others(path: str, calls: Mapping[str, list[Call]]) -> set[int]:
    """Axes of what is made outside a stack: lengths that a sequence from elsewhere may have."""
    results = [c.result for p, made in calls.items() if not p.startswith(f"{path}.") for c in made]
    return {n for result in results if result is not None and result.dim() == 3 for n in result.shape[:2]}


def _may_be_norm(module: nn.Module) -> bool:
    """Whether a module holds vectors, or nothing (OLMo's norm has no gains), and no other modules."""
    holds_nothing = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
    return holds_nothing or is_vectors_only(module)


def _shape(call: Call) -> tuple[Shape, int | None]:
    """Batch and length of a block's sequence, and the length of another sequence it is given."""
    hidden = call.hidden
    assert hidden is not None
    axes = hidden.shape[1:3] if hidden.dim() == 4 and hidden.shape[0] != ROWS else hidden.shape[:2]
    batch, length = axes if axes[0] == ROWS else (axes[1], axes[0])
    own = {length, batch}
    others = [
        n
        for t in call.tensors()
        if t.dim() == 3 and batch in t.shape[:2]
        for n in t.shape[:2]
        if n not in own
    ]
    return Shape(batch, length), next(iter(others), None)


def _prove_kind(
    block: nn.Module,
    call: Call,
    own: Mapping[str, Call],
    seen: list[AttentionCall],
    mark: str,
    fed: set[int],
) -> BlockKind:
    """All experiments on one make of block."""
    shape, other = _shape(call)
    other = other if other in fed else None  # global tokens (Pegasus-X) are no other sequence
    layers = {p: m for p, m in inner_modules(block) if is_linear(m)}
    opened: set[str] = set()  # mixers that hold an MLP too are looked into
    while True:
        parts = find_parts(block, own, shape, other, opened=opened)
        _doubt_readers(block, own, parts, layers, seen)
        roles, evidence, behind = _mixer_roles(block, own, parts, layers, seen, shape, other)
        if not behind - opened:
            break
        opened |= behind
    roles |= _mlp_roles(block, call, own, parts, layers, seen)
    running = parts.of("mixer", "cross_mixer", "position_wise")
    norms = parts.of("norm")
    return BlockKind(
        signature=mark,
        parts=parts.kinds,
        roles=roles,
        causal=parts.causal,
        residual={p: residual_of(p, block, call, own, running, norms) for p in running},
        norms=next(iter(parts.norms)) if len(parts.norms) == 1 else "mixed" if parts.norms else "none",
        evidence="+".join(sorted(evidence)),
        unproven=parts.unproven,
    )


def _doubt_readers(
    block: nn.Module,
    own: Mapping[str, Call],
    parts: Parts,
    layers: Mapping[str, nn.Module],
    seen: list[AttentionCall],
) -> None:
    """Take back that a part works on each position alone where it reads attention."""
    for path in parts.of("position_wise"):
        inside = {p: m for p, m in layers.items() if p.startswith(f"{path}.")}
        if inside and Bench(block.get_submodule(path), own[path], inside, seen).run()[1]:
            del parts.kinds[path]
            parts.unproven[path] = "it reads attention, but no change of its input is felt elsewhere"


def _mixer_roles(
    block: nn.Module,
    own: Mapping[str, Call],
    parts: Parts,
    layers: Mapping[str, nn.Module],
    seen: list[AttentionCall],
    shape: Shape,
    other: int | None,
) -> tuple[dict[str, str], set[str], set[str]]:
    """The roles of the linear layers of a block's mixers, the evidence, and mixers that hold more than a mixer."""
    roles: dict[str, str] = {}
    evidence: set[str] = set()
    behind: set[str] = set()
    for path in parts.of("mixer", "cross_mixer"):
        inside = {p: m for p, m in layers.items() if p == path or p.startswith(f"{path}.")}
        across = other if parts.kinds[path] == "cross_mixer" else None
        looked_at = Shape(shape.batch, across) if across is not None else None
        found, how = attribute_mixer(
            Bench(block.get_submodule(path), own[path], inside, seen), shape, looked_at
        )
        if "behind" in found.values() and not is_linear(block.get_submodule(path)):
            behind.add(path)
        kind = "cross_attention" if parts.kinds[path] == "cross_mixer" else "attention"
        roles |= {p: f"{kind}.{role}" for p, role in found.items()}
        evidence |= {how} - {""}
    return roles, evidence, behind


def _mlp_roles(
    block: nn.Module,
    call: Call,
    own: Mapping[str, Call],
    parts: Parts,
    layers: Mapping[str, nn.Module],
    seen: list[AttentionCall],
) -> dict[str, str]:
    """The roles of the linear layers of a block's position-wise parts."""
    roles: dict[str, str] = {}
    alone: dict[str, nn.Module] = {}
    for path in parts.of("position_wise"):
        inside = {p: m for p, m in layers.items() if p == path or p.startswith(f"{path}.")}
        if len(inside) <= 1:
            alone |= inside
            continue
        found = attribute_mlp(Bench(block.get_submodule(path), own[path], inside, seen))
        roles |= {p: f"mlp.{role}" for p, role in found.items()}
    if alone:
        found = attribute_mlp(Bench(block, call, alone, seen))
        roles |= {p: f"mlp.{role}" for p, role in found.items()}
    return roles


def _prove_head(twin: nn.Module, calls: Mapping[str, list[Call]], output: Any) -> str:
    """What the logits are."""
    head = output_head(twin)
    path = next((p for p, m in twin.named_modules() if m is head), None)
    runs = calls.get(path or "", ())
    return compare_head(getattr(output, "logits", None), runs[-1].result if runs else None)
