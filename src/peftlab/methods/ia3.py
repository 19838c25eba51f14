"""IA3: learned vectors that scale keys, values and the inner activation of the position-wise part, by peft.

k' = l_k * k, v' = l_v * v, h' = W_down (l_ff * f(W_up x)), with every l one at the start.

Source: Liu et al. 2022, arXiv 2205.05638, section 3.3; peft `tuners/ia3/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import field_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

_PAPER = ("attention.key", "attention.value", "cross_attention.key", "cross_attention.value", "mlp.down")
_FUSED = ("attention.qkv", "attention.key_value", "cross_attention.key_value")

RATE_TO_LORA = 3.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on IA3."""

    targets: str | tuple[str, ...] | None = None
    """What is scaled, as in LoRA; None is the paper's: keys, values (where they are one module with the queries, that) and
    the input of mlp.down. Everything but mlp.down is scaled at its output."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if targets is not None and (not targets or not all(targets)):
            raise ValueError("at least one target is needed")
        return targets


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add IA3 to a base.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: The targets.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds a new head's copy; the vectors are ones.

    Returns:
        The attachment; every vector is one, so the model still answers as the base does.

    Raises:
        TargetError: The targets match nothing in this model.
    """
    import peft

    from peftlab.attaching.attachment import TASK_TYPES, PeftAttachment
    from peftlab.attaching.targeting import is_transposed, trained_whole

    selection = family.select(_of_the_paper(family) if settings.targets is None else settings.targets)
    whole = trained_whole(model, family, selection, head=head)
    config = peft.IA3Config(
        target_modules=[site.path for site in selection.adapted],
        feedforward_modules=[site.path for site in selection.adapted if site.role == "mlp.down"],
        modules_to_save=list(whole.modules) or None,
        task_type=TASK_TYPES[head],
        fan_in_fan_out=is_transposed(model, selection.adapted),
    )
    return PeftAttachment(model, config, selection, steps_to_train=lambda name: 1, seed=seed, tied=whole.tied)


def _of_the_paper(family: FamilyMap) -> list[str]:
    """The paper's roles as far as this model has them; without any, all of them, for the error that says so."""
    there = {site.role for site in family.sites if site.linear}
    return [role for role in (*_PAPER, *_FUSED) if role in there] or list(_PAPER)
