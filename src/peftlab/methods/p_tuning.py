"""P-tuning: virtual tokens in front of the text, made by a small trained network, by peft.

[f(p_1 ... p_n); e(x_1) ... e(x_m)], with f an MLP or an LSTM over trained embeddings p. An encoder-decoder reads them in its
encoder.

Source: Liu et al. 2021, arXiv 2103.10385, section 2.2; peft `tuners/p_tuning/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 1.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on P-tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Virtual tokens in front of the text."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network that makes them: three linear layers, or a two-way LSTM and two linear layers."""
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Its inner width; None is the model's own."""
    encoder_num_layers: int | None = Field(default=None, ge=1)
    """Layers of the LSTM, two where None; the MLP always has three linear ones."""
    encoder_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout between the LSTM's layers."""

    @model_validator(mode="after")
    def _has_effect(self) -> Settings:
        if self.encoder == "mlp" and (self.encoder_num_layers is not None or self.encoder_dropout):
            raise ValueError("encoder_num_layers and encoder_dropout have no effect on encoder 'mlp'")
        return self


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Put virtual tokens in front of what a base reads.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: How many virtual tokens, and the network that makes them.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds the network.

    Returns:
        The attachment.

    Raises:
        MethodError: The base reads no text.
    """
    import peft

    from peftlab.attaching.attachment import TASK_TYPES
    from peftlab.attaching.prompting import PromptAttachment, embedding_width
    from peftlab.attaching.targeting import new_modules

    config = peft.PromptEncoderConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        encoder_reparameterization_type=settings.encoder.upper(),
        encoder_hidden_size=settings.encoder_hidden_size or embedding_width(model),
        encoder_num_layers=settings.encoder_num_layers or 2,
        encoder_dropout=settings.encoder_dropout,
        num_transformer_submodules=1,
        modules_to_save=new_modules(model, head) or None,
        task_type=TASK_TYPES[head],
    )
    return PromptAttachment(model, config, seed=seed)
