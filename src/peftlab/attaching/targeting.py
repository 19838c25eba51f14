"""What peft is told of a base: names of modules to adapt, what is trained whole beside them, how weights are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peftlab.family import FamilyMap, Selection, Site
from peftlab.method import Head


@dataclass(frozen=True, slots=True)
class TrainedWhole:
    """What is trained whole beside an adapter.

    Attributes:
        modules: Paths for peft's `modules_to_save`: embeddings and head where they are selected, new heads of a classifier.
        by_peft: Whether peft ties an embedding and its head by itself (`ensure_weight_tying`).
        tied: Modules that share one weight and must share it again; for `PeftAttachment`.
    """

    modules: tuple[str, ...]
    by_peft: bool
    tied: tuple[str, ...]


def trained_whole(
    model: nn.Module, family: FamilyMap, selection: Selection, *, head: Head, peft_ties: bool = False
) -> TrainedWhole:
    """What is trained whole beside an adapter.

    Args:
        model: The base.
        family: Its map.
        selection: What the targets stand for.
        head: What the model ends in; a classification head is new and is trained whole.
        peft_ties: Whether the peft config knows `ensure_weight_tying`.

    Returns:
        The modules, and how they are tied.
    """
    new = new_modules(model, head)
    saved = [site.path for site in selection.saved if not lies_in(site.path, new)]
    aliases = _sharing_modules(model, saved[0]) if saved and family.tied else []
    # peft ties an embedding and its head; where more modules share the weight (T5), PeftAttachment does it.
    by_peft = peft_ties and len(aliases) == 1
    tied = () if by_peft or not aliases else (saved[0], *aliases)
    saved += new
    return TrainedWhole(tuple(dict.fromkeys([*saved, *aliases])), by_peft, tied)


def _sharing_modules(model: nn.Module, path: str) -> list[str]:
    """The other modules whose weight is the very tensor of one module: the head, a second stack's embedding."""
    weight = model.get_submodule(path).weight
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if name != path and getattr(module, "weight", None) is weight]


def lies_in(path: str, modules: Sequence[str]) -> bool:
    """Whether a path is one of some modules or lies in one: a copy of the module holds it already.

    Args:
        path: A path.
        modules: Paths of modules.
    """
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def new_modules(model: nn.Module, head: Head) -> list[str]:
    """What a classification model has beside its pretrained trunk (DistilBERT: two layers); peft knows one of them.

    Args:
        model: The base.
        head: What it ends in.

    Returns:
        Names of modules that are new and must be trained whole; none for models that generate.
    """
    if head != "classification":
        return []
    trunk = getattr(model, "base_model_prefix", "")
    parts = model.named_children()
    return [name for name, part in parts if name != trunk and any(True for _ in part.parameters())]


def target_names(family: FamilyMap, sites: Sequence[Site]) -> list[str]:
    """The shortest names by which peft finds exactly the chosen modules.

    Args:
        family: The map of the base.
        sites: The chosen sites.

    Returns:
        Last path components (`q_proj`) where these match nothing else, else full paths.
    """
    chosen = {site.path for site in sites}
    short = sorted({path.rpartition(".")[2] for path in chosen})
    matched = {site.path for site in family.sites if site.path.rpartition(".")[2] in short}
    return short if matched == chosen and not family.partial else sorted(chosen)


def expert_parameters(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The 3-D parameters of groups of experts, one matrix for each expert; peft's `target_parameters`.

    Args:
        model: The base.
        sites: The groups.

    Returns:
        Full names.
    """
    return [
        f"{site.path}.{name}"
        for site in sites
        for name, parameter in model.get_submodule(site.path).named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def is_transposed(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether the weights of chosen modules are laid out (in, out), as in GPT-2's Conv1D; peft's `fan_in_fan_out`.

    Args:
        model: The base.
        sites: The chosen sites.

    Returns:
        True where one is.
    """
    return any(type(model.get_submodule(site.path)).__name__ == "Conv1D" for site in sites)
