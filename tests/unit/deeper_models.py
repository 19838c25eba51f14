"""Tiny models that new blocks are put into, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

import tiny_models
from peftlab.catalog import METHODS
from peftlab.mapping import map_model
from tiny_models import HIDDEN, LABELS, VOCABULARY, randomise

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


def _gemma2(num_layers: int) -> Any:
    """Norms behind both branches, and layers that look through a window and at everything in turns."""
    config = T.Gemma2Config(
        num_hidden_layers=num_layers, num_key_value_heads=2, head_dim=4, sliding_window=4, **_SIZES, **_ENDS
    )
    return T.Gemma2ForCausalLM(config)


def _roberta(num_layers: int) -> Any:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS}
    return T.RobertaForSequenceClassification(
        T.RobertaConfig(num_hidden_layers=num_layers, **_SIZES, **quiet)
    )


def _mixtral(num_layers: int) -> Any:
    """With two experts for a token: the share of a single one is always one, and its router has no gradient."""
    config = T.MixtralConfig(
        num_hidden_layers=num_layers, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **_SIZES, **_ENDS
    )  # fmt: skip
    return T.MixtralForCausalLM(config)


_OWN: dict[str, Callable[[int], Any]] = {"gemma2": _gemma2, "roberta": _roberta, "mixtral": _mixtral}
GATED = {
    "llama": False, "gpt2": False, "opt": False, "bloom": False, "gptj": False, "t5": False, "bert": True, "roberta": True,
    "distilbert": True, "bart": True, "mixtral": True, "gemma2": True,
}  # fmt: skip
"""Name to whether a new block of it needs a gate to be the identity."""
GENERATING = ("llama", "gpt2", "opt", "bloom", "gptj", "t5", "bart", "mixtral", "gemma2")
CASES = [
    *((name, None) for name in GATED if name not in ("t5", "bart")),
    *((name, stack) for name in ("t5", "bart") for stack in ("encoder", "decoder", "both")),
]
"""Names and stacks."""


def head(name: str) -> Any:
    """What a model ends in."""
    return "classification" if name == "roberta" else tiny_models.HEADS.get(name, "causal")


def build(name: str, num_layers: int = 3) -> Any:
    """A tiny random model, the same values every time."""
    if name in _OWN:
        return randomise(_OWN[name](num_layers)).eval()
    return tiny_models.build(name, num_layers)


def inputs(name: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens of one forward pass; the second row of two is padded on the left where the model generates."""
    like = name if name in tiny_models.HEADS else "bert" if head(name) == "classification" else "llama"
    made = tiny_models.inputs(like, seed=seed)
    if head(name) == "causal":
        made["attention_mask"][1, :3] = 0
    return made


def training_inputs(name: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same with labels."""
    like = name if name in tiny_models.HEADS else "bert" if head(name) == "classification" else "llama"
    return tiny_models.training_inputs(like, seed=seed)


def attach(base: Any, name: str, method: str = "new_layer", *, seed: int = 1, **settings: Any) -> Any:
    """A method on a base, in evaluation mode."""
    leaf = METHODS.load(method)
    attached = leaf.attach(base, map_model(base), leaf.Settings(**settings), head=head(name), seed=seed)
    attached.model.eval()
    return attached


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model(**inputs(name)).logits


def generate(model: Any, name: str, *, use_cache: bool = True) -> list[list[int]]:
    """Six tokens for each row, the likeliest each time."""
    given = {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    made = model.generate(
        **given, do_sample=False, use_cache=use_cache, min_new_tokens=6, max_new_tokens=6, pad_token_id=0
    )
    return made.tolist()


def perturb(attached: Any, *, scale: float = 0.3) -> None:
    """Move every tensor of an adapter, as a training would."""
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter.dtype) * scale)
