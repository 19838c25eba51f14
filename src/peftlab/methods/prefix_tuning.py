"""Prefix tuning: trained keys and values in front of those of every attention, by peft.

Attention(Q, [P_K; K], [P_V; V]) in every layer, with P trained directly or made from embeddings by an MLP. An
encoder-decoder has them in its decoder's attention to itself.

Source: Li and Liang 2021, arXiv 2101.00190, section 4; peft `tuners/prefix_tuning/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 3.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on prefix tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Keys and values in front of those of the text, in every layer."""
    projection: bool = False
    """Whether an MLP makes them from embeddings, as the paper trains them."""
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """The MLP's inner width; None is the model's own."""

    @model_validator(mode="after")
    def _has_effect(self) -> Settings:
        if self.encoder_hidden_size is not None and not self.projection:
            raise ValueError("encoder_hidden_size has no effect without projection")
        return self


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Put keys and values in front of those of a base's attention.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: How many, and how they are made.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds them.

    Returns:
        The attachment.

    Raises:
        MethodError: The base takes no keys and values from outside, or recomputes them (gradient checkpointing).
    """
    import peft

    from peftlab.attaching.attachment import TASK_TYPES
    from peftlab.attaching.prompting import PromptAttachment, embedding_width
    from peftlab.attaching.targeting import new_modules

    config = peft.PrefixTuningConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        prefix_projection=settings.projection,
        encoder_hidden_size=settings.encoder_hidden_size or embedding_width(model),
        modules_to_save=new_modules(model, head) or None,
        task_type=TASK_TYPES[head],
    )
    return PromptAttachment(model, config, seed=seed)
