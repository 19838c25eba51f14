"""The new blocks of one model: chosen, tried on a twin, made, put in; their tensors, and what stands before these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.errors import MethodError, did_you_mean
from peftlab.family import FamilyMap, Site
from peftlab.insertion.inserting import Insertion, OwnConfigs, neighbour_of
from peftlab.insertion.new_blocks import (
    GATE,
    MARK,
    add_gate,
    copy_block,
    draw_anew,
    own_parameters,
    scale_outputs,
    share_parameters,
)
from peftlab.insertion.stack_facts import configs_of
from peftlab.insertion.trial import OUTPUT_ROLES, Place, Trial, try_block
from peftlab.mapping.structure import signature
from peftlab.placement import SMALL_SCALE, Placement
from peftlab.streams import seed_for

Factor = tuple[str, int, str]
"""What may be zero at the start: stack, layer, and the path in the block of an output projection, or the gate's name."""


@dataclass(frozen=True, slots=True)
class GrownStack:
    """New blocks in one stack.

    Attributes:
        stack: The stack's name.
        path: Path of its list of blocks in the model.
        insertion: The new blocks and their place.
        outputs: Path in a block of each output projection, to its role.
        gated: Whether the blocks have gates.
        common: Modules in the blocks that are the base's.
    """

    stack: str
    path: str
    insertion: Insertion
    outputs: Mapping[str, str]
    gated: bool
    common: tuple[nn.Module, ...] = ()

    @property
    def layers(self) -> range:
        """The layers that the new blocks are."""
        return range(self.insertion.index, self.insertion.index + len(self.insertion.blocks))


class NewLayers:
    """New blocks on a live base; out of it until `put_in`.

    Args:
        model: The base.
        family: Its map.
        placement: Where they stand and how they start.
        seed: Seeds fresh weights.
        lent: New blocks of another model whose tensors are these blocks' tensors too.

    Attributes:
        placement: Where they stand and how they start.
        grown: One entry for each stack.
        parameters: Their tensors, by name in the base with the blocks in it.

    Raises:
        MethodError: There is no such stack or place, the stack is not proved, or it takes no block more.
    """

    def __init__(
        self,
        model: nn.Module,
        family: FamilyMap,
        placement: Placement,
        *,
        seed: int,
        lent: NewLayers | None = None,
    ) -> None:
        self.placement = placement
        plans = [_plan(model, family, stack, placement) for stack in chosen_stacks(family, placement.stack)]
        cores = {id(plan.core): plan.core for plan in plans}
        self._configs = [OwnConfigs(core) for core in cores.values()]
        try:
            self.grown = tuple(self._grow(plan, seed, lent) for plan in plans)
        except Exception:
            self._give_back()
            raise
        self._parameters: dict[str, tuple[nn.Module, str]] = {}
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        for stack in self.grown:
            for layer, block in zip(stack.layers, stack.insertion.blocks, strict=True):
                self._collect(f"{stack.path}.{layer}.", block, stack.common)

    def _grow(self, plan: _Plan, seed: int, lent: NewLayers | None) -> GrownStack:
        """Make the blocks of one stack."""
        neighbour = plan.blocks[neighbour_of(plan.index)]
        inside = {path for path, _ in neighbour.named_modules()}
        shared = sorted(inside & plan.trial.facts.only_some)
        common = [neighbour.get_submodule(path) for path in shared]
        made = []
        for number in range(self.placement.count):
            block = copy_block(neighbour, shared=shared, kept=configs_of(plan.core).values())
            if self.placement.initialization == "random" and lent is None:
                draw_anew(
                    block, plan.owner, common, seed=seed_for(seed, "new_layer", plan.relative_path, number)
                )
            self._make_start(block, plan)
            if lent is not None:
                own = own_parameters(block, common)
                share_parameters(block, lent.lend(f"{plan.path}.{plan.index + number}.", own))
            made.append(block)
        insertion = Insertion(plan.core, plan.relative_path, plan.trial.facts, index=plan.index, blocks=made)
        return GrownStack(plan.stack, plan.path, insertion, plan.outputs, plan.trial.gated, tuple(common))

    def _make_start(self, block: nn.Module, plan: _Plan) -> None:
        """Make a block the identity, or nearly so."""
        factor = 0.0
        if self.placement.initialization == "scale":
            factor = SMALL_SCALE if self.placement.scale is None else self.placement.scale
        if plan.trial.gated:
            add_gate(block, factor)
        else:
            scale_outputs(block, plan.outputs, factor)

    def _collect(self, prefix: str, block: nn.Module, common: Iterable[nn.Module]) -> None:
        """Note a block's own tensors by the names that they have in the base."""
        own = own_parameters(block, common)
        places = {
            id(p): (m, key) for m in block.modules() for key, p in m._parameters.items() if p is not None
        }
        self._parameters |= {prefix + name: places[id(parameter)] for name, parameter in own.items()}
        for path, module in block.named_modules():
            for name in sorted(module._buffers.keys() - module._non_persistent_buffers_set):
                self._buffers[f"{prefix}{path}.{name}" if path else prefix + name] = (module, name)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The blocks' own parameters by name in the base, as they stand there now: they may be exchanged for fakes."""
        found = {name: module._parameters[key] for name, (module, key) in self._parameters.items()}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def lend(self, prefix: str, own: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The tensors of one of these blocks, for a block of another model.

        Args:
            prefix: The block's path with a dot.
            own: The other block's tensors, by path in it.

        Returns:
            Path in the block to this block's tensor.

        Raises:
            MethodError: There is no such block here, or it is of another shape.
        """
        found = {name: self.parameters.get(prefix + name) for name in own}
        wrong = [n for n, p in found.items() if p is None or p.shape != own[n].shape]
        if wrong:
            raise MethodError(
                f"the new blocks cannot be shared: {prefix}{wrong[0]} of this base has no tensor of its shape among them"
            )
        return {name: p for name, p in found.items() if p is not None}

    def put_in(self) -> None:
        """Put the blocks into the model."""
        for stack in self.grown:
            stack.insertion.put_in()

    def take_out(self) -> None:
        """Take the blocks out of the model."""
        for stack in self.grown:
            stack.insertion.take_out()

    def remove(self) -> None:
        """Take the blocks out for good: the model refers to the configs again that it was given with."""
        self.take_out()
        self._give_back()

    def stay(self) -> None:
        """Make the blocks the base's own, for good."""
        for stack in self.grown:
            stack.insertion.stay()

    def _give_back(self) -> None:
        for configs in self._configs:
            configs.give_back()

    @contextmanager
    def out(self) -> Iterator[None]:
        """A context without the blocks."""
        self.take_out()
        try:
            yield
        finally:
            self.put_in()

    def state(self) -> dict[str, torch.Tensor]:
        """The blocks' tensors and lasting buffers, by name in the base; not copied."""
        buffers = {name: module._buffers[key] for name, (module, key) in self._buffers.items()}
        return {**self.parameters, **{name: b for name, b in buffers.items() if b is not None}}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put values into the blocks.

        Args:
            tensors: By the names and in the shapes of `state`.
        """
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(tensors[name])

    def describe(self) -> list[dict[str, Any]]:
        """Where the blocks stand and how they are the identity, as JSON-ready values."""
        return [
            {
                "stack": stack.stack,
                "path": stack.path,
                "layers": list(stack.layers),
                "copied_from": neighbour_of(stack.insertion.index),
                "gated": stack.gated,
            }
            for stack in self.grown
        ]

    def notes(self) -> Iterator[str]:
        """What a person should know: where the blocks stand and how they start.

        Yields:
            Sentences.
        """
        for stack in self.grown:
            layers = ", ".join(str(layer) for layer in stack.layers)
            where = "a gate" if stack.gated else "output projections"
            value = "zero, the identity"
            if self.placement.initialization == "scale":
                value = f"{self.placement.scale or SMALL_SCALE:g}, nearly the identity"
            kind = {"random": "fresh weights"}.get(
                self.placement.initialization, f"a copy of layer {neighbour_of(stack.insertion.index)}"
            )
            yield f"new block at layer {layers} of {stack.path}: {kind}, with {where} at {value}"

    def factors(self, family: FamilyMap, name: str) -> tuple[frozenset[Factor], frozenset[Factor]]:
        """The factors that are zero at the start and have to do with one tensor.

        Args:
            family: The map of the model that the blocks are in.
            name: A tensor's name in that model.

        Returns:
            The factors it stands in front of, of which one must be open before it has a gradient; and the factors that
            it opens itself.
        """
        nothing: tuple[frozenset[Factor], frozenset[Factor]] = (frozenset(), frozenset())
        site = family.locate(name)
        stack = next((g for g in self.grown if g.stack == site.stack and site.layer in g.layers), None)
        if stack is None or site.layer is None or self.placement.initialization == "scale":
            return nothing
        if stack.gated:
            gate = frozenset({(stack.stack, site.layer, GATE)})
            return (frozenset(), gate) if name.endswith(f".{GATE}") else (gate, frozenset())
        inner = site.path[len(family.blocks(stack.stack)[site.layer].path) + 1 :]
        if inner in stack.outputs:
            return frozenset(), frozenset({(stack.stack, site.layer, inner)})
        before = {p for p, role in stack.outputs.items() if _kind(role) == _kind(site.role)}
        return frozenset((stack.stack, site.layer, p) for p in before or stack.outputs), frozenset()


def _kind(role: str) -> str:
    return role.partition(".")[0]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of one stack before anything is made."""

    stack: str
    path: str
    relative_path: str
    core: Any
    owner: Any
    index: int
    blocks: nn.ModuleList
    outputs: Mapping[str, str]
    trial: Trial


def chosen_stacks(family: FamilyMap, wanted: str | None) -> list[str]:
    """The stacks that a setting names.

    Args:
        family: The map of the base.
        wanted: encoder, decoder, both, a stack's own name, or None.

    Returns:
        Names of the map's stacks.

    Raises:
        MethodError: There is no such stack, or None does not tell which.
    """
    names = list(family.stacks)
    if wanted is None and (len(names) == 1 or "encoder" in names):
        return names if len(names) == 1 else ["encoder"]
    if wanted in names:
        return [wanted]
    if wanted == "both" and {"encoder", "decoder"} <= set(names):
        return ["encoder", "decoder"]
    if wanted in ("encoder", "decoder") and len(names) == 1:
        proof = family.proofs.get(names[0])
        back_only = {kind.causal for kind in proof.kinds} - {None} if proof else set()
        if back_only == {wanted == "decoder"}:
            return names
    given = "method.stack must be named" if wanted is None else f"there is no stack '{wanted}'"
    known = [*names, *(["both"] if {"encoder", "decoder"} <= set(names) else [])]
    raise MethodError(
        f"{given} in this {family.model_type} model{did_you_mean(wanted or '', known)}; there is: {', '.join(known)}"
    )


def _plan(model: nn.Module, family: FamilyMap, stack: str, placement: Placement) -> _Plan:
    """Choose the place of new blocks in one stack and try them on a twin."""
    sites = family.blocks(stack)
    path = sites[0].path.rpartition(".")[0]
    blocks = model.get_submodule(path)
    prefix, core, owner = _holders(model, path)
    proof = family.proofs.get(stack)
    if not isinstance(blocks, nn.ModuleList) or core is None or proof is None or not proof.kinds:
        problem = next(
            (c.problem for c in family.certificates if c.problem), "its blocks did not run in a twin"
        )
        raise MethodError(f"no new block in {path}: what its blocks do is not proved, because {problem}")
    if proof.order or len({id(block) for block in blocks}) < len(blocks):
        raise MethodError(
            f"no new block in {path}: its blocks run more than once, and a block more would run with all of them"
        )
    if any(MARK in vars(block) for block in blocks):
        raise MethodError(
            f"{path} has new blocks already; take them off first, or give method.count more than one"
        )
    index = {"start": 0, "end": len(blocks)}.get(str(placement.position), placement.position)
    if not isinstance(index, int) or index > len(blocks):
        raise MethodError(
            f"method.position {index} lies outside {path}: a new block can stand at 0 to {len(blocks)}"
        )
    neighbour = blocks[neighbour_of(index)]
    mark = signature(neighbour)
    if proof.kind(mark) is None:
        raise MethodError(
            f"no new block in {path}: layer {neighbour_of(index)} is of a make that no twin has, so nothing is proved of it"
        )
    place: Place = "start" if index == 0 else "end" if index == len(blocks) else "inside"
    trial = try_block(core, proof, mark=mark, place=place)
    outputs = _outputs(family.sites, sites[neighbour_of(index)].path)
    return _Plan(stack, path, path[len(prefix) :], core, owner, index, blocks, outputs, trial)


def _outputs(sites: tuple[Site, ...], block: str) -> dict[str, str]:
    """The output projections of one block: path in it to role."""
    return {
        site.path[len(block) + 1 :]: site.role
        for site in sites
        if site.linear and site.role in OUTPUT_ROLES and site.path.startswith(f"{block}.")
    }


def _holders(model: nn.Module, path: str) -> tuple[str, Any, Any]:
    """The outermost and the innermost transformers model around a list of blocks, with the outermost's path prefix."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    around = [(".".join(parts[:n]), model.get_submodule(".".join(parts[:n]))) for n in range(len(parts))]
    found = [(name, module) for name, module in around if isinstance(module, PreTrainedModel)]
    if not found:
        return "", None, None
    return (f"{found[0][0]}." if found[0][0] else ""), found[0][1], found[-1][1]
