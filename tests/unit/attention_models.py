"""Tiny models whose attention differs: grouped heads, windows, caps, sinks, biases; each for any implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

from tiny_models import HIDDEN, VOCABULARY, build, randomise

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip


def of(model_class: Any, config_class: Any, **changes: Any) -> Callable[[str], Any]:
    """A builder of a model with a given attention implementation; the same values every time."""

    def make(implementation: str) -> Any:
        config = config_class(**SIZES | changes)
        return randomise(model_class._from_config(config, attn_implementation=implementation)).eval()

    return make


def known(name: str) -> Callable[[str], Any]:
    """The same for an architecture of `tiny_models`."""

    def make(implementation: str) -> Any:
        model = build(name)
        model.set_attn_implementation(implementation)
        return model

    return make


LAYERED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
CAUSAL: dict[str, tuple[Callable[[str], Any], str]] = {
    "llama": (known("llama"), "sdpa"),
    "mistral": (of(T.MistralForCausalLM, T.MistralConfig, sliding_window=3), "sdpa"),
    "mixtral": (known("mixtral"), "sdpa"),
    "qwen3": (of(T.Qwen3ForCausalLM, T.Qwen3Config), "sdpa"),
    "gemma2": (of(T.Gemma2ForCausalLM, T.Gemma2Config, attn_logit_softcapping=2.0, **LAYERED), "eager"),
    "gemma3": (of(T.Gemma3ForCausalLM, T.Gemma3TextConfig, **LAYERED), "sdpa"),
    "gpt_oss": (
        of(T.GptOssForCausalLM, T.GptOssConfig, num_local_experts=2, num_experts_per_tok=1, **LAYERED),
        "eager",
    ),
    "gpt2": (known("gpt2"), "sdpa"),
}
ROBERTA = {"head_dim": None, "num_key_value_heads": None, "pad_token_id": 0, "hidden_dropout_prob": 0.0}
ENCODERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bert": (known("bert"), "sdpa"),
    "roberta": (of(T.RobertaForMaskedLM, T.RobertaConfig, **ROBERTA), "sdpa"),
    "distilbert": (known("distilbert"), "sdpa"),
}


def padded_inputs(length: int = 9, pad: str = "right") -> dict[str, torch.Tensor]:
    """Two rows, the second with three pads."""
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if pad != "none":
        mask[1, slice(length - 3, length) if pad == "right" else slice(0, 3)] = 0
    return {"input_ids": ids, "attention_mask": mask}
