"""Hybrid: LoRA and new transformer blocks trained together on a frozen base.

LoRA stands on the layers of the base and of the new blocks, whose own weights train beside it; the two kinds are counted
apart. On the shape of flan-t5-small, rank 8 on q, k, v and o with one new encoder layer: 688,128 + 28,672 + 2,360,320.

Source: as `lora` and `new_layer`; peft `tuners/lora/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from peftlab.placement import Placement

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 0.5
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(Placement):
    """What can be set on a hybrid."""

    rank: int = Field(default=8, ge=1)
    """Rank of LoRA's update."""
    alpha: float = Field(default=16, gt=0)
    """Scale of LoRA's update: alpha / rank."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on LoRA's input while training."""
    targets: str | tuple[str, ...] = "both"
    """What LoRA adapts, as in LoRA; the new blocks' layers are among it."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets or not all(targets):
            raise ValueError("at least one target is needed")
        return targets


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add new blocks and LoRA to a base.

    Args:
        model: The base; the blocks are put into it, its own tensors are not changed.
        family: The map of the base.
        settings: Rank, alpha, dropout and targets of LoRA; where the blocks stand and how they start.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds A, and fresh weights.

    Returns:
        The attachment; the model still answers as the base does, unless initialization=scale.

    Raises:
        MethodError: There is no such stack or place, the stack is not proved, or it takes no block more.
        TargetError: The targets match nothing in this model.
    """
    from peftlab.attaching.combining import HybridAttachment

    return HybridAttachment(model, family, settings, head=head, seed=seed)
