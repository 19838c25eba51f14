"""Prompt tuning: trained embeddings of virtual tokens in front of the text, by peft.

[p_1 ... p_n; e(x_1) ... e(x_m)], with every p trained and the model frozen. An encoder-decoder reads them in its encoder.

Source: Lester et al. 2021, arXiv 2104.08691, section 2; peft `tuners/prompt_tuning/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 10.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on prompt tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Virtual tokens in front of the text."""


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Put virtual tokens in front of what a base reads.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: How many virtual tokens.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Chooses the vocabulary's embeddings that they begin as.

    Returns:
        The attachment.

    Raises:
        MethodError: The base reads no text.
    """
    import peft

    from peftlab.attaching.attachment import TASK_TYPES
    from peftlab.attaching.prompting import PromptAttachment
    from peftlab.attaching.targeting import new_modules

    config = peft.PromptTuningConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
        num_transformer_submodules=1,
        modules_to_save=new_modules(model, head) or None,
        task_type=TASK_TYPES[head],
    )
    return PromptAttachment(model, config, seed=seed)
