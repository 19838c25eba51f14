"""Twins: tiny models of the same architecture, with every gain and bias moved away from where it begins."""

import pytest
import torch
import transformers as T

from peftlab.mapping.twin import build_twin, randomise, twin_config, twin_inputs

LARGE = {
    "llama": T.LlamaConfig(
        num_hidden_layers=80, num_key_value_heads=8, num_attention_heads=64, hidden_size=8192
    ),
    "mqa": T.LlamaConfig(num_hidden_layers=12, num_key_value_heads=1),
    "gemma2": T.Gemma2Config(),
    "t5": T.T5Config(num_layers=12, num_decoder_layers=24),
    "deepseek_v3": T.DeepseekV3Config(),
    "clip": T.CLIPConfig(),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_config_becomes_a_tiny_model_that_runs(name):
    config = LARGE[name]
    before = config.to_dict()
    small = twin_config(config)
    assert config.to_dict() == before, "the given config is not changed"
    twin = build_twin(getattr(T, T.models.auto.modeling_auto.MODEL_MAPPING_NAMES[config.model_type]), small)
    assert sum(p.numel() for p in twin.parameters()) < 1_500_000
    with torch.no_grad():
        twin(**twin_inputs(twin))


def test_ratios_of_heads_and_kinds_of_layers_are_kept():
    assert twin_config(LARGE["llama"]).num_key_value_heads == 2, "grouped"
    assert twin_config(LARGE["mqa"]).num_key_value_heads == 1, "one for all"
    assert twin_config(T.LlamaConfig(num_key_value_heads=32)).num_key_value_heads == 4, "one for each"
    few = twin_config(T.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, hidden_size=16))
    assert (few.num_attention_heads, few.num_key_value_heads) == (2, 2), (
        "a model of fewer heads than a twin has"
    )
    gemma = twin_config(LARGE["gemma2"])
    assert gemma.layer_types == LARGE["gemma2"].layer_types[:4]


def test_special_tokens_lie_in_the_small_vocabulary():
    config = twin_config(
        T.LlamaConfig(vocab_size=128_256, bos_token_id=128_000, eos_token_id=[128_001, 128_009])
    )
    assert 0 <= config.bos_token_id < config.vocab_size
    assert all(0 <= token < config.vocab_size for token in config.eos_token_id)


def test_gains_and_biases_are_not_where_they_begin():
    model = T.GPT2Model(twin_config(T.GPT2Config()))
    randomise(model)
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, f"{name} is still constant"


def test_the_same_seed_gives_the_same_twin_and_leaves_the_callers_stream_alone():
    config = twin_config(T.GPT2Config())
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two = (build_twin(T.GPT2Model, config, seed=3).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
