"""LoRA: low-rank adapters beside linear layers, by peft.

h = W0 x + (alpha / rank) B A x, with A (rank, in) random, B (out, rank) zero at the start, W0 frozen.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; peft `tuners/lora/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap, Selection
    from peftlab.method import Attachment, Head


class Settings(_Settings):
    """What can be set on LoRA."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=16, gt=0)
    """Scale of the update: alpha / rank."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: str | tuple[str, ...] = "both"
    """A target group of `peftlab list targets`, a role such as attention.query, a module name, or a list of these."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets or not all(targets):
            raise ValueError("at least one target is needed")
        return targets


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add LoRA to a base.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: Rank, alpha, dropout and targets.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds A.

    Returns:
        The attachment; B is zero, so the model still answers as the base does.

    Raises:
        TargetError: The targets match nothing in this model.
    """
    import peft

    from peftlab.attachment import TASK_TYPES, PeftAttachment

    selection = family.select(settings.targets)
    saved = [site.path for site in selection.saved]
    aliases = _sharing_modules(model, saved[0]) if saved and family.tied else []
    # peft ties an embedding and its head; where more modules share the weight (T5), PeftAttachment does it.
    by_peft = len(aliases) == 1
    if head == "classification":
        saved += _new_modules(model)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_names(family, selection),
        modules_to_save=list(dict.fromkeys([*saved, *aliases])) or None,
        ensure_weight_tying=by_peft,
        task_type=TASK_TYPES[head],
        fan_in_fan_out=any(type(model.get_submodule(s.path)).__name__ == "Conv1D" for s in selection.adapted),
        bias="none",
    )
    tied = () if by_peft or not aliases else (saved[0], *aliases)
    return PeftAttachment(model, config, selection, steps_to_train=_steps_to_train, seed=seed, tied=tied)


def _sharing_modules(model: nn.Module, path: str) -> list[str]:
    """The other modules whose weight is the very tensor of one module: the head, a second stack's embedding."""
    weight = model.get_submodule(path).weight
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if name != path and getattr(module, "weight", None) is weight]


def _new_modules(model: nn.Module) -> list[str]:
    """What a classification model has beside its pretrained trunk (DistilBERT: two layers); peft knows one of them."""
    trunk = getattr(model, "base_model_prefix", "")
    parts = model.named_children()
    return [name for name, part in parts if name != trunk and any(True for _ in part.parameters())]


def target_names(family: FamilyMap, selection: Selection) -> list[str]:
    """The shortest names by which peft finds exactly the selected modules.

    Args:
        family: The map of the base.
        selection: The selected sites.

    Returns:
        Last path components (`q_proj`) where these match nothing else, else full paths.
    """
    chosen = {site.path for site in selection.adapted}
    short = sorted({path.rpartition(".")[2] for path in chosen})
    matched = {site.path for site in family.sites if site.path.rpartition(".")[2] in short}
    return short if matched == chosen else sorted(chosen)


def _steps_to_train(name: str) -> int:
    """Law 1's K: A learns only once B, zero at the start, has moved; everything else at once."""
    return 2 if ".lora_A." in name or ".lora_embedding_A." in name else 1
