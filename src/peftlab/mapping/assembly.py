"""A live model's FamilyMap, put together from its structure and the certificate of its architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peftlab.certificate import BlockKind, Certificate, StackProof
from peftlab.errors import ModelError
from peftlab.family import FamilyMap, Site
from peftlab.mapping.certifying import certify
from peftlab.mapping.structure import (
    alike_siblings,
    block_lists,
    inner_modules,
    input_embedding,
    is_classifier,
    is_linear,
    is_tied,
    is_vectors_only,
    leaves,
    output_head,
    signature,
    stack_names,
    unwrap,
    widths,
)

_MIXERS = {"mixer": "attention", "cross_mixer": "cross_attention"}


def map_model(model: nn.Module) -> FamilyMap:
    """Map a model.

    Args:
        model: A transformers model, bare, wrapped by peft, or inside another module, on any device (meta too).

    Returns:
        The map; its paths are those of the given object. What could not be proved stands in `unproven`.

    Raises:
        ModelError: No list of transformer blocks was found.
    """
    cores = dict(_cores(model))
    certificates = {prefix: certify(core) for prefix, core in cores.items()}
    towers = dict(_towers(cores, certificates))
    return assemble(model, cores | towers, certificates | {p: certify(core) for p, core in towers.items()})


def assemble(
    model: nn.Module, cores: Mapping[str, nn.Module], certificates: Mapping[str, Certificate]
) -> FamilyMap:
    """Put a map together.

    Args:
        model: The model.
        cores: The transformers models inside, by path prefix; one may lie in another, its stacks are its own.
        certificates: The certificate of each.

    Returns:
        The map.

    Raises:
        ModelError: No list of transformer blocks was found.
    """
    outermost = {p: core for p, core in cores.items() if not any(p != q and p.startswith(q) for q in cores)}
    lists = {
        f"{prefix}{path}": blocks
        for prefix, core in outermost.items()
        for path, blocks in block_lists(core).items()
    }
    kind = _model_type(model)
    if not lists:
        raise ModelError(
            f"no transformer blocks found in this {kind} model: expected a ModuleList of checkpointable layers"
        )
    names = stack_names(list(lists))
    sites: list[Site] = []
    unproven: dict[str, str] = {}
    proofs: dict[str, StackProof] = {}
    for path, blocks in lists.items():
        prefix = max((p for p in cores if path.startswith(p)), key=len)
        proof = certificates[prefix].stack(path[len(prefix) :])
        proofs[names[path]] = _ordered(proof, len(blocks)) if proof else StackProof(path)
        for layer, block in enumerate(blocks):
            found = proof.kind(signature(block)) if proof else None
            reason = _reason(certificates[prefix], proof, found)
            sites += _block_sites(block, f"{path}.{layer}", names[path], layer, found, reason, unproven)
    for prefix, core in outermost.items():
        inside = tuple(f"{path}." for path in lists)
        sites += _outer_sites(core, prefix, inside)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    sites.sort(key=lambda site: order[site.path])
    return FamilyMap(
        model_type=kind,
        sites=tuple(sites),
        stacks={names[path]: len(blocks) for path, blocks in lists.items()},
        tied=any(is_tied(core) for core in outermost.values()),
        proofs=proofs,
        certificates=tuple(certificates.values()),
        unproven=unproven,
    )


def _ordered(proof: StackProof, num_blocks: int) -> StackProof:
    """A twin's proof with the order in which this model's blocks run, where some run more than once."""
    order, known = proof.order, len(set(proof.order))
    if not order or known == num_blocks:
        return proof
    rounds = len(order) // known
    if order == tuple(range(known)) * rounds:  # the whole stack several times over (HRM)
        return replace(proof, order=tuple(range(num_blocks)) * rounds)
    return replace(proof, order=(), outputs="its twin shares its blocks in another way")


def _cores(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers models in a module, by path prefix; the module itself where there are none."""
    from transformers import PreTrainedModel

    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_lies_in(path, outer) for outer in found):
            found.append(path)
            yield (f"{path}." if path else ""), module
    if not found:
        yield "", model


def _towers(
    cores: Mapping[str, nn.Module], certificates: Mapping[str, Certificate]
) -> Iterator[tuple[str, nn.Module]]:
    """The models inside models whose stacks no twin of the whole has shown, by path prefix.

    A vision tower does not run when the whole is given text alone; by itself it does.
    """
    from transformers import PreTrainedModel

    for prefix, core in cores.items():
        for path in block_lists(core):
            proof = certificates[prefix].stack(path)
            if proof is not None and proof.kinds:
                continue
            parts = path.split(".")
            for length in range(1, len(parts)):
                inner = ".".join(parts[:length])
                tower = core.get_submodule(inner)
                if isinstance(tower, PreTrainedModel) and type(tower.config) is not type(core.config):
                    yield f"{prefix}{inner}.", tower
                    break


def _lies_in(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _model_type(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) or type(model).__name__


def _reason(certificate: Certificate, proof: StackProof | None, kind: BlockKind | None) -> str:
    """Why a block's parts are not proved; "" where they are."""
    if certificate.problem:
        return certificate.problem
    if proof is None:
        return "its twin has no such stack"
    if kind is None:
        return (
            "its stack does not run in a forward pass of the twin"
            if not proof.kinds
            else "its twin has no such block"
        )
    return ""


def _block_sites(
    block: nn.Module,
    path: str,
    stack: str,
    layer: int,
    kind: BlockKind | None,
    reason: str,
    unproven: dict[str, str],
) -> list[Site]:
    """The sites of one block; what is not proved is put into `unproven` and counts to no group."""
    sites = [Site(path, "block", "other", stack, layer)]
    proved = kind or BlockKind("")
    alike = alike_siblings(block)
    for inner, module in inner_modules(block):
        full = f"{path}.{inner}"
        role = _found(proved.roles, inner, alike(inner))
        part = _found(proved.parts, inner, alike(inner))
        size = widths(module) if is_linear(module) else (0, 0)
        if part in _MIXERS and not is_linear(module):
            sites.append(Site(full, _MIXERS[part], "attention", stack, layer))
        elif role is not None:
            group = "mlp" if role.startswith("mlp.") else "attention"
            linear = is_linear(module) and role != "mlp.router"
            sites.append(Site(full, role, group, stack, layer, *size, linear=linear))
        elif part == "norm":
            sites.append(Site(full, "norm", "other", stack, layer))
        elif part == "position_wise":
            sites.append(Site(full, "mlp", "mlp", stack, layer))
        elif _holds_experts(module) and _inside(inner, proved, "position_wise"):
            sites.append(Site(full, "mlp.experts", "mlp", stack, layer))
        elif is_linear(module):
            unproven[full] = reason or _why(inner, proved)
            sites.append(Site(full, "unproven", "other", stack, layer, *size, linear=True))
    return sites


def _found(proved: Mapping[str, str], inner: str, alike: str) -> str | None:
    """What was proved of a module, or of those of the twin that stand in its place: a twin has fewer experts."""
    if inner in proved or "#" not in alike:
        return proved.get(inner)
    siblings = re.compile(re.escape(alike).replace(r"\#", r"[^.]*\d[^.]*"))
    values = {value for path, value in proved.items() if siblings.fullmatch(path)}
    return values.pop() if len(values) == 1 else None


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as 3-D parameters."""
    return any(parameter.dim() == 3 for parameter in unwrap(module).parameters(recurse=False))


def _inside(inner: str, kind: BlockKind, part: str) -> bool:
    """Whether a module lies in a part of some kind."""
    return any(k == part and (inner == p or inner.startswith(f"{p}.")) for p, k in kind.parts.items())


def _why(inner: str, kind: BlockKind) -> str:
    """Why one layer of a proved block has no role."""
    for path, reason in kind.unproven.items():
        if inner == path or inner.startswith(f"{path}."):
            return reason
    return "it did not run in the twin"


def _outer_sites(model: nn.Module, prefix: str, inside: tuple[str, ...]) -> list[Site]:
    """The sites outside the blocks: embeddings, head, final norms, poolers."""
    embedding, head = input_embedding(model), output_head(model)
    sites = []
    for name, module in leaves(model):
        path = f"{prefix}{name}"
        if path.startswith(inside):
            continue
        inner: Any = unwrap(module)
        size = widths(module) if is_linear(module) else (0, 0)
        if inner is embedding:
            sites.append(Site(path, "embedding", "embed"))
        elif isinstance(inner, nn.Embedding):  # positions, token types, a second stack's tokens
            sites.append(Site(path, "embedding.other", "embed"))
        elif inner is head or (head is None and is_classifier(model, inner)):
            sites.append(Site(path, "head", "lm_head", "", None, *size, linear=is_linear(module)))
        elif is_vectors_only(module):
            sites.append(Site(path, "norm", "other"))
        elif any(True for _ in module.parameters()):
            sites.append(Site(path, "other", "other", "", None, *size, linear=is_linear(module)))
    return sites
