"""Trainable tensors and parameters of a known shape, computed by hand: TinyLlama-1.1B with rank 4."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_models  # noqa: F401 - keeps torch on one thread
from peftlab.mapping import map_model
from peftlab.methods import lora

LAYERS, HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY, RANK = 22, 2048, 256, 5632, 32000, 4
SHAPES = {  # in + out of every projection
    "q": 2 * HIDDEN, "k": HIDDEN + KEY_VALUE, "v": HIDDEN + KEY_VALUE, "o": 2 * HIDDEN,
    "gate": HIDDEN + INTERMEDIATE, "up": HIDDEN + INTERMEDIATE, "down": INTERMEDIATE + HIDDEN,
}  # fmt: skip


@pytest.fixture
def tiny_llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=4, intermediate_size=INTERMEDIATE,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("targets", "letters", "parameters", "tensors"),
    [
        ("both", "q k v o gate up down", 3_153_920, 308),
        ("attention_qv", "q v", 563_200, 88),
        ("attention_only", "q v", 563_200, 88),
        ("attention", "q k v o", 1_126_400, 176),
        ("mlp", "gate up down", 2_027_520, 132),
    ],
)
def test_counts_of_tiny_llama(tiny_llama, targets, letters, parameters, tensors):
    assert parameters == LAYERS * RANK * sum(SHAPES[letter] for letter in letters.split())
    attached = lora.attach(
        tiny_llama, map_model(tiny_llama), lora.Settings(rank=RANK, targets=targets), head="causal", seed=0
    )
    found = attached.parameters()
    assert len(found) == tensors
    assert sum(p.numel() for p in found.values()) == parameters
    assert {p.device.type for p in found.values()} == {"meta"}
    assert {name for name, p in attached.model.named_parameters() if p.requires_grad} == set(found)


def test_all_adds_embeddings_and_head_as_whole_tensors(tiny_llama):
    attached = lora.attach(
        tiny_llama, map_model(tiny_llama), lora.Settings(rank=RANK, targets="all"), head="causal", seed=0
    )
    found = attached.parameters()
    assert len(found) == 308 + 2
    assert sum(p.numel() for p in found.values()) == 3_153_920 + 2 * VOCABULARY * HIDDEN


def test_another_rank_gives_another_count(tiny_llama):
    """The companion: the golden numbers are those of rank 4 alone."""
    attached = lora.attach(
        tiny_llama, map_model(tiny_llama), lora.Settings(rank=5, targets="both"), head="causal", seed=0
    )
    assert sum(p.numel() for p in attached.parameters().values()) == 3_153_920 * 5 // 4
