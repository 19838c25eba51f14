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

    from peftlab.family import FamilyMap
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

    from peftlab.attachment import (
        TASK_TYPES,
        PeftAttachment,
        expert_parameters,
        is_transposed,
        target_names,
        trained_whole,
    )

    selection = family.select(settings.targets, experts=True)
    whole = trained_whole(model, family, selection, head=head, peft_ties=True)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if selection.experts else settings.dropout,  # peft adapts 3-D parameters without
        target_modules=target_names(family, selection.adapted),
        target_parameters=expert_parameters(model, selection.experts) or None,
        modules_to_save=list(whole.modules) or None,
        ensure_weight_tying=whole.by_peft,
        task_type=TASK_TYPES[head],
        fan_in_fan_out=is_transposed(model, selection.adapted),
        bias="none",
    )
    return PeftAttachment(
        model, config, selection, steps_to_train=_steps_to_train, seed=seed, tied=whole.tied
    )


def _steps_to_train(name: str) -> int:
    """Law 1's K: A learns only once B, zero at the start, has moved; everything else at once."""
    return 2 if ".lora_A." in name or ".lora_embedding_A." in name else 1
