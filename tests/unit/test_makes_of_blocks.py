"""Makes of blocks that a small twin does not have by itself: more experts, shared keys, sparse attention."""

from __future__ import annotations

import pytest
import torch
import transformers as T

import tiny_models
from peftlab.errors import TargetError
from peftlab.mapping import map_model
from peftlab.mapping.structure import alike_siblings, signature

SWITCH = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
}  # fmt: skip


def build(config: T.PretrainedConfig, name: str):
    with torch.device("meta"):
        return getattr(T, name)(config)


@pytest.mark.parametrize("experts", [2, 8, 11])
def test_more_experts_than_a_twin_has(experts):
    model = build(
        T.SwitchTransformersConfig(num_experts=experts, **SWITCH),
        "SwitchTransformersForConditionalGeneration",
    )
    family = map_model(model)
    assert len(family.select("attention").adapted) == 4 * 4 + 2 * 4
    inside = [site.path for site in family.select("mlp").adapted]
    assert (
        sum(f".expert_{experts - 1}." in path for path in inside)
        == sum(".expert_0." in path for path in inside)
        > 0
    )
    assert not family.unproven


def test_siblings_of_other_makes_stay_apart():
    block = tiny_models.build("t5").decoder.block[0]
    alike = alike_siblings(block)
    assert alike("layer.1.EncDecAttention.q") == "layer.1.EncDecAttention.q"
    assert signature(block) != signature(tiny_models.build("t5").encoder.block[0])


def test_sparse_attention_is_proved_on_a_twin_of_its_own():
    config = T.BigBirdConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=512, block_size=16,
    )  # fmt: skip
    family = map_model(build(config, "BigBirdForMaskedLM"))
    assert [site.role for site in family.select("attention").adapted] == [
        "attention.query", "attention.key", "attention.value", "attention.output",
    ] * 2  # fmt: skip


def test_layers_that_take_keys_from_others_are_left_out_and_said():
    kinds = ["sliding_attention", "full_attention"] * 3
    config = T.Gemma3nTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=[48] * 6, num_hidden_layers=6, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, layer_types=kinds, num_kv_shared_layers=2, vocab_size_per_layer_input=64, laurel_rank=8,
        hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.0] * 6,
    )  # fmt: skip
    family = map_model(build(config, "Gemma3nForCausalLM"))
    selection = family.select("attention")
    assert {site.layer for site in selection.adapted} == {0, 1, 2, 3}
    assert any("left out of target groups" in note for note in selection.notes)
    assert len(family.select("mlp").adapted) == 6 * 7


def test_an_unknown_make_is_refused():
    model = tiny_models.build("llama")
    model.model.layers[1].self_attn.extra = torch.nn.Linear(16, 16)
    with pytest.raises(TargetError, match="its twin has no such block"):
        map_model(model).select("attention")
