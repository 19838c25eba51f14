"""What a family is: where the parts of an architecture are, and what they are for.

A `FamilyMap` says for every module that can be adapted which role it has (attention.query, mlp.down, embedding, head),
in which stack and layer it lies, and for every parameter to which group it counts. `mapping.py` makes it from a live
model; nothing here touches torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from peftlab.certificate import Certificate, StackProof
from peftlab.errors import TargetError, did_you_mean

TARGET_GROUPS: dict[str, str] = {
    "attention_qv": "query and value projections of every attention (S1's attention_only)",
    "attention": "query, key, value and output projections of every attention",
    "mlp": "the linear layers of every position-wise part: gate, up, down or their like (S1's mlp_only)",
    "both": "attention and mlp",
    "all": "both, and the embeddings and the head trained whole",
}
"""Target group to what it stands for."""

_QUERY_VALUE = ("query", "value", "qkv", "key_value", "query_key")
_ALL = {"key and value": "both", "query, key and value": "all three"}

SEED_SPELLINGS = {"attention_only": "attention_qv", "mlp_only": "mlp"}
"""S1's spellings of target groups."""


@dataclass(frozen=True, slots=True)
class Site:
    """One module with its place in the model.

    Attributes:
        path: Its dotted path, e.g. "model.layers.0.self_attn.q_proj".
        role: What it is for: attention.query, cross_attention.key, mlp.down, norm, embedding, head, other.
        group: The parameter group it counts to: attention, mlp, embed, lm_head or other.
        stack: The stack of blocks it lies in, "" outside the stacks.
        layer: Index of its block in the stack, None outside the stacks.
        in_features: Input width; 0 where it is not linear.
        out_features: Output width; 0 where it is not linear.
        linear: Whether it is a linear layer (Linear or Conv1D) that a low-rank adapter can stand beside.
    """

    path: str
    role: str
    group: str
    stack: str = ""
    layer: int | None = None
    in_features: int = 0
    out_features: int = 0
    linear: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """What a person's targets stand for in one model.

    Attributes:
        adapted: Linear sites that get an adapter beside them.
        saved: Sites trained whole (embeddings and head); of a tied pair only the embedding.
        notes: What a person should know, e.g. that query, key and value are one fused module here.
        experts: Groups of experts held as 3-D parameters, where they were asked for.
        scope: Of the map that was asked.
    """

    adapted: tuple[Site, ...]
    saved: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    experts: tuple[Site, ...] = ()
    scope: str = ""


@dataclass(frozen=True, slots=True)
class FamilyMap:
    """Where the parts of one model are.

    Attributes:
        model_type: The config's `model_type`, or the class name where there is none.
        sites: All sites, in the model's order.
        stacks: Stack name to its number of layers, in the model's order.
        tied: Whether the head shares its weight with the input embedding.
        proofs: Stack name to what was proved about it.
        certificates: The certificates of the transformers models inside, one for each.
        unproven: Path of a linear layer in a block to the reason why nothing is known of it.
        scope: What the adapter of this part of the model is called beside those of other parts; "" where the whole model
            is one adapter's.
        partial: Whether the model has blocks that the map does not show: names of modules may mean others too.
    """

    model_type: str
    sites: tuple[Site, ...]
    stacks: Mapping[str, int]
    tied: bool = False
    proofs: Mapping[str, StackProof] = field(default_factory=dict)
    certificates: tuple[Certificate, ...] = ()
    unproven: Mapping[str, str] = field(default_factory=dict)
    scope: str = ""
    partial: bool = False
    _by_path: Mapping[str, Site] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_path", {site.path: site for site in self.sites})

    def locate(self, parameter_name: str) -> Site:
        """The site that a parameter belongs to.

        Args:
            parameter_name: A name from `named_parameters()` of the mapped model, adapter parts included.

        Returns:
            The site with the longest matching path; a site of group "other" where none matches.
        """
        path = parameter_name
        while path:
            path = path.rpartition(".")[0]
            found = self._by_path.get(path)
            if found is not None:
                return found
        return Site(path=parameter_name, role="other", group="other")

    def blocks(self, stack: str | None = None) -> tuple[Site, ...]:
        """The blocks, in the model's order.

        Args:
            stack: A name from `stacks`; None takes every stack.

        Returns:
            One site of role "block" for each layer; its output is layer i (`hidden_states[i + 1]`).
        """
        return tuple(s for s in self.sites if s.role == "block" and stack in (None, s.stack))

    def mixers(self, stack: str | None = None) -> tuple[Site, ...]:
        """The token mixers (attention and its like), in the model's order.

        Args:
            stack: A name from `stacks`; None takes every stack.

        Returns:
            Sites of role "attention" and "cross_attention": the modules that hold the projections.
        """
        roles = ("attention", "cross_attention")
        return tuple(s for s in self.sites if s.role in roles and stack in (None, s.stack))

    def layout(self, stack: str) -> str:
        """The axes of a stack's hidden states: "bsh" (batch, seq, hidden), "sbh" or "bhs"."""
        return self.proofs[stack].layout if stack in self.proofs else "bsh"

    def order(self, stack: str) -> tuple[int, ...]:
        """Which block makes each layer's output: 0, 1, 2 ... but where blocks are shared (ALBERT: 0, 0, 0 ...)."""
        proof = self.proofs.get(stack)
        return (proof.order if proof else ()) or tuple(range(self.num_blocks(stack)))

    def num_outputs(self, stack: str) -> int:
        """The number of layers as hidden states count them: more than there are blocks where these are shared."""
        return len(self.order(stack))

    def num_blocks(self, stack: str) -> int:
        """The number of blocks of a stack, shared ones once; 0 for "" (outside the stacks)."""
        return self.stacks.get(stack, 0)

    def tower(self, scope: str) -> str:
        """The path of the module that a scope stands for.

        Args:
            scope: A name from `stacks`, which stands for the outermost module that holds this stack and no other, or the
                path of a module with blocks in it.

        Returns:
            The path in the mapped model.

        Raises:
            TargetError: There is no such part.
        """
        paths = {stack: self.blocks(stack)[0].path.split(".") for stack in self.stacks}
        if scope in paths and len(paths) > 1:
            own = paths[scope]
            others = [path for stack, path in paths.items() if stack != scope]
            known = max(next(i for i, part in enumerate(own) if part != path[i]) for path in others)
            return ".".join(own[: known + 1])
        if any(block.path == scope or block.path.startswith(f"{scope}.") for block in self.blocks()):
            return scope
        there = f"towers: {', '.join(paths)}" if len(paths) > 1 else "it has one stack; leave the scope out"
        raise TargetError(
            f"scope '{scope}' is no part of this {self.model_type} model{did_you_mean(scope, paths)}; {there}, or the path"
            " of a module with transformer blocks"
        )

    def within(self, scope: str) -> FamilyMap:
        """The map of one part of the model: an adapter that is attached by it adapts that part alone.

        Args:
            scope: As in `tower`.

        Returns:
            A map with the sites, stacks and proofs of that part; the paths stay those of the whole model.

        Raises:
            TargetError: There is no such part.
        """
        tower = self.tower(scope)
        inside = [s for s in self.sites if s.path == tower or s.path.startswith(f"{tower}.")]
        stacks = {site.stack for site in inside if site.role == "block"}
        return replace(
            self,
            sites=tuple(inside),
            stacks={stack: number for stack, number in self.stacks.items() if stack in stacks},
            proofs={stack: proof for stack, proof in self.proofs.items() if stack in stacks},
            unproven={p: reason for p, reason in self.unproven.items() if p.startswith(f"{tower}.")},
            scope=scope,
            partial=True,
        )

    def column(self, site: Site) -> str | None:
        """The layer column a site's gradient counts to: `layer_0_attention`, `decoder_layer_3_mlp`.

        Args:
            site: A site of this map.

        Returns:
            The column name; None outside the stacks and for groups that have no layer columns.
        """
        if site.layer is None or site.group not in ("attention", "mlp"):
            return None
        prefix = f"{site.stack}_" if len(self.stacks) > 1 else ""
        return f"{prefix}layer_{site.layer}_{site.group}"

    def select(self, targets: str | Iterable[str], *, experts: bool = False) -> Selection:
        """What targets stand for in this model.

        Args:
            targets: Target groups, roles, module names or full paths.
            experts: Whether experts held as 3-D parameters count to `mlp`, `both` and `all`.

        Returns:
            The sites, each once, in the model's order.

        Raises:
            TargetError: A target matches nothing, or needs roles that could not be told apart here.
        """
        wanted = [targets] if isinstance(targets, str) else list(targets)
        chosen: dict[str, Site] = {}
        saved: tuple[Site, ...] = ()
        groups: tuple[Site, ...] = ()
        for target in wanted:
            name = SEED_SPELLINGS.get(target, target)
            held = self.experts if experts and name in ("mlp", "both", "all") else ()
            if name in TARGET_GROUPS:
                self._require_proof(target)
            found = self._group(name) if name in TARGET_GROUPS else self._named(name)
            empty = [part for part in self._empty_parts(name) if part != "mlp" or not held]
            if (not found and not held) or empty:
                raise TargetError(self._nothing(target, empty))
            chosen |= {site.path: site for site in found}
            groups = groups or held
            if name == "all":
                saved = self._whole()
        ordered = tuple(site for site in self.sites if site.path in chosen)
        names = {SEED_SPELLINGS.get(target, target) for target in wanted}
        return Selection(ordered, saved, tuple(self._notes(names, ordered, groups)), groups, self.scope)

    @property
    def experts(self) -> tuple[Site, ...]:
        """The groups of experts held as 3-D parameters."""
        return tuple(site for site in self.sites if site.role == "mlp.experts")

    def _require_proof(self, target: str) -> None:
        """Refuse a target group where a stack is not proved, or only in part.

        Args:
            target: The group as it was given.

        Raises:
            TargetError: The purpose of layers that the group would be chosen from is not known.
        """
        proved = {(s.stack, s.layer) for s in self.sites if s.linear and s.group in ("attention", "mlp")}
        blank = [p for p in self.unproven if (self.locate(p).stack, self.locate(p).layer) not in proved]
        stacks = {stack for stack, _ in proved}
        wrong = [path for path in blank if not stacks or self.locate(path).stack in stacks]
        if wrong:
            names = sorted({path.rpartition(".")[2] for path in self.unproven})
            raise TargetError(
                f"target group '{target}': what the parts of this {self.model_type} model do is not proved, because"
                f" {self.unproven[wrong[0]]} ({wrong[0]}); name modules instead, such as {', '.join(names[:6])}"
            )

    def _notes(self, targets: set[str], chosen: tuple[Site, ...], held: tuple[Site, ...]) -> Iterator[str]:
        """What a person should know about a selection.

        Args:
            targets: The targets.
            chosen: The sites they stand for.
            held: The groups of experts they stand for.

        Yields:
            Sentences.
        """
        fused = [s for s in chosen if s.role.rpartition(".")[2] in ("qkv", "key_value", "query_key")]
        if fused and "attention_qv" in targets:
            made = "key and value" if fused[0].role.endswith("key_value") else "query, key and value"
            yield f"{made} are one module here ({fused[0].path}): attention_qv adapts {_ALL[made]}"
        if "attention_qv" in targets:
            taken = tuple(s.path for s in chosen)
            without = [m.path for m in self.mixers() if not any(p.startswith(f"{m.path}.") for p in taken)]
            if without:
                yield (
                    f"{len(without)} token mixers have no query or value layers that could be told apart and are left as"
                    f" they are, such as {without[0]}"
                )
        if targets & {"mlp", "both", "all"}:
            experts = self.experts
            if experts:
                done = "adapted without dropout" if held else "left as they are"
                yield (
                    f"{len(experts)} groups of experts hold their weights as 3-D parameters ({experts[0].path}) and are"
                    f" {done}"
                )
        groups = targets & TARGET_GROUPS.keys()
        if groups and self.unproven:
            path, reason = next(iter(self.unproven.items()))
            yield f"{len(self.unproven)} linear layers are left out of target groups, such as {path}: {reason}"

    def _group(self, name: str) -> list[Site]:
        """The linear sites of a target group."""
        blocks = [s for s in self.sites if s.linear and s.layer is not None]
        if name in ("both", "all"):
            return [s for s in blocks if s.group in ("attention", "mlp")]
        if name == "attention_qv":
            return [s for s in blocks if s.role.rpartition(".")[2] in _QUERY_VALUE]
        return [s for s in blocks if s.group == name]

    def _empty_parts(self, name: str) -> list[str]:
        """The halves of `both` and `all` that this model does not have."""
        return [part for part in ("attention", "mlp") if name in ("both", "all") and not self._group(part)]

    def _named(self, name: str) -> list[Site]:
        """The linear sites with a role, a full path, or a path that ends in the given components."""
        return [
            s
            for s in self.sites
            if s.linear and (s.role == name or s.path == name or s.path.endswith(f".{name}"))
        ]

    def _whole(self) -> tuple[Site, ...]:
        """Input embedding and head, a tied pair once."""
        found = [s for s in self.sites if s.role == "embedding"]
        return tuple(found if self.tied else [*found, *(s for s in self.sites if s.role == "head")])

    def _nothing(self, target: str, empty: list[str]) -> str:
        """The message for a target that matches nothing, or whose parts in `empty` do."""
        linear = [s for s in self.sites if s.linear]
        roles = sorted({s.role for s in linear})
        names = sorted({s.path.rpartition(".")[2] for s in linear})
        groups = [g for g in TARGET_GROUPS if self._group(g) and not self._empty_parts(g)]
        needs = " needs " + " and ".join(f"'{part}'" for part in empty) + ", which" if empty else ""
        hint = "" if empty else did_you_mean(target, [*groups, *roles, *names])
        return (
            f"target '{target}'{needs} matches nothing in this {self.model_type} model{hint};"
            f" groups: {', '.join(groups) or 'none'};"
            f" roles: {', '.join(roles) or 'none'}; module names: {', '.join(names) or 'none'}"
        )
