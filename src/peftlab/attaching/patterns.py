"""What a person's layers, rank patterns and further modules stand for in one model: exact paths, never part of a name.

peft matches patterns as regular expressions and `modules_to_save` by the end of a name, so that `norm` would take
`input_layernorm` too. Here every name is resolved by the family map before peft sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from peftlab.errors import MethodError, TargetError, did_you_mean
from peftlab.family import SEED_SPELLINGS, TARGET_GROUPS, FamilyMap, Selection, Site

Value = TypeVar("Value", int, float)
_SHOWN = 8


def limit_layers(family: FamilyMap, selection: Selection, layers: Sequence[int] | None) -> Selection:
    """A selection in some layers of each stack; what lies outside the stacks stays.

    Args:
        family: The map of the base.
        selection: What the targets stand for.
        layers: Layers counted from 0 in each stack; None is all.

    Returns:
        The selection, with a note that says which layers of how many.

    Raises:
        TargetError: A layer is beyond every stack, or nothing is left in these layers.
    """
    if layers is None:
        return selection
    stacks = {stack: number for stack, number in family.stacks.items() if number}
    counts = ", ".join(f"the {stack} has {number} layers" for stack, number in stacks.items())
    if len(stacks) == 1:
        counts = f"the model has {max(stacks.values())} layers"
    beyond = [layer for layer in layers if layer >= max(stacks.values(), default=0)]
    if beyond:
        raise TargetError(f"layers: there is no layer {beyond[0]}, counted from 0: {counts}")
    kept = tuple(s for s in selection.adapted if s.layer is None or s.layer in layers)
    experts = tuple(s for s in selection.experts if s.layer in layers)
    if not any(s.layer is not None for s in (*kept, *experts)):
        raise TargetError(f"layers: the targets have nothing in layers {_listed(layers)}; {counts}")
    note = f"layers: only {_listed(layers)} of each stack, counted from 0, get an adapter; {counts}"
    return replace(selection, adapted=kept, experts=experts, notes=(*selection.notes, note))


def resolve_pattern(
    family: FamilyMap, sites: Sequence[Site], pattern: Mapping[str, Value], *, name: str
) -> dict[str, Value]:
    """The values of a pattern by the exact path of each module it decides about.

    Of several keys that match a module the narrowest decides: a path before a module name, a role, a target group.

    Args:
        family: The map of the base.
        sites: The modules that get an adapter.
        pattern: Target group, role, module name or path to a value.
        name: The setting, for messages.

    Returns:
        Path to value, for the modules that a key matches.

    Raises:
        TargetError: A key matches nothing adapted, decides about nothing, or two equally narrow ones disagree.
    """
    taken: dict[str, tuple[int, str]] = {}
    for key in pattern:
        matched = _matches(family, sites, key)
        if not matched:
            raise TargetError(f"{name}: '{key}' matches nothing that is adapted{_there(sites, key)}")
        for site in matched:
            narrow = _narrowness(site, key)
            before = taken.get(site.path)
            if before and before[0] == narrow and pattern[before[1]] != pattern[key]:
                raise TargetError(f"{name}: '{before[1]}' and '{key}' disagree about {site.path}; name it")
            if before is None or narrow > before[0]:
                taken[site.path] = (narrow, key)
    idle = pattern.keys() - {key for _, key in taken.values()}
    if idle:
        raise TargetError(f"{name}: '{min(idle)}' decides nothing: narrower keys name all that it matches")
    return {path: pattern[key] for path, (_, key) in taken.items()}


def _matches(family: FamilyMap, sites: Sequence[Site], key: str) -> list[Site]:
    """The adapted modules that a pattern's key stands for."""
    group = SEED_SPELLINGS.get(key, key)
    if group not in TARGET_GROUPS:
        return [s for s in sites if key in (s.role, s.path) or s.path.endswith(f".{key}")]
    chosen = family.select(key, experts=True)
    paths = {site.path for site in (*chosen.adapted, *chosen.experts)}
    return [site for site in sites if site.path in paths]


def _narrowness(site: Site, key: str) -> int:
    """How closely a key names a module: a group 0, a role 1, a name 2 and more with its components, the path most."""
    if SEED_SPELLINGS.get(key, key) in TARGET_GROUPS:
        return 0
    if site.path == key:
        return 1 + len(site.path)
    return 1 if site.role == key else 2 + key.count(".")


def _there(sites: Iterable[Site], key: str) -> str:
    """What a key could have named."""
    roles = sorted({site.role for site in sites})
    names = sorted({site.path.rpartition(".")[2] for site in sites})
    hint = did_you_mean(key, [*roles, *names])
    return f"{hint}; adapted roles: {', '.join(roles)}; module names: {', '.join(names)}"


def further_modules(
    model: nn.Module, family: FamilyMap, selection: Selection, names: Sequence[str]
) -> Selection:
    """A selection with further modules that are trained whole.

    Args:
        model: The base.
        family: Its map.
        selection: What the targets stand for.
        names: Module names or paths; a name takes every module whose path ends in its components.

    Returns:
        The selection with the modules in `saved`; for a head that shares its weight with the embedding, the embedding.

    Raises:
        TargetError: A name matches no module.
        MethodError: A module has no parameters, or holds or lies in an adapted one or another that is trained whole.
    """
    saved = {site.path: site for site in selection.saved}
    notes = list(selection.notes)
    for name in names:
        found = [p for p, _ in model.named_modules() if p and (p == name or p.endswith(f".{name}"))]
        if not found:
            near = sorted({p.rpartition(".")[2] for p, _ in model.named_modules() if p})
            raise TargetError(
                f"modules_to_save: there is no module '{name}'{did_you_mean(name, near)}; there are:"
                f" {', '.join(n for n in near if not n.isdigit())}"
            )
        for path in found:
            site, note = _whole_site(model, family, path)
            notes += [note] if note and note not in notes else []
            saved.setdefault(site.path, site)
    ordered = sorted(saved.values(), key=lambda site: site.role != "embedding")  # the tied weight comes first
    _check_apart(ordered, selection)
    return replace(selection, saved=tuple(ordered), notes=tuple(notes))


def _whole_site(model: nn.Module, family: FamilyMap, path: str) -> tuple[Site, str]:
    """The site of a module that is trained whole, and what a person should know of it."""
    known = {site.path: site for site in family.sites}
    module = model.get_submodule(path)
    if not any(True for _ in module.parameters()):
        raise MethodError(f"modules_to_save: '{path}' has no parameters to train")
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise MethodError(
            f"modules_to_save: '{path}' is a list of modules, not one that is called; name them"
        )
    site = known.get(path, Site(path=path, role="other", group="other"))
    if family.tied and site.role == "head":
        embedding = next((s for s in family.sites if s.role == "embedding"), site)
        if getattr(module, "weight", None) is getattr(model.get_submodule(embedding.path), "weight", None):
            return embedding, f"{path} and {embedding.path} share one weight: they are trained whole as one"
    return site, ""


def _check_apart(saved: Sequence[Site], selection: Selection) -> None:
    """Refuse a module trained whole that holds or lies in another such, or in an adapted one.

    Raises:
        MethodError: There is one.
    """
    for site in saved:
        others = [*selection.adapted, *selection.experts, *(s for s in saved if s is not site)]
        for other in others:
            if f"{other.path}.".startswith(f"{site.path}.") or f"{site.path}.".startswith(f"{other.path}."):
                raise MethodError(
                    f"modules_to_save: '{site.path}' would be trained whole, and '{other.path}' has an adapter or is"
                    " trained whole too; narrow targets, or take one of them out"
                )


def _listed(layers: Sequence[int]) -> str:
    """Layers in words: a run of several as "2-5"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    shown = ", ".join(str(layer) for layer in layers[:_SHOWN])
    return shown + (" ..." if len(layers) > _SHOWN else "")
