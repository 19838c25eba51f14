"""Twins: tiny models of the same architecture, with every gain and bias moved away from where it begins."""

import pytest
import torch
import transformers as T

from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check
from peftlab.mapping.twin import build_twin, classifies_by_decoder, randomise, twin_config, twin_inputs

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


CLASSIFIERS = {
    "t5": (T.T5ForSequenceClassification, T.T5ForConditionalGeneration, T.T5Config(decoder_start_token_id=0)),
    "bart": (T.BartForSequenceClassification, T.BartForConditionalGeneration, T.BartConfig()),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_encoder_decoder_that_classifies_is_mapped_as_the_one_that_generates(name):
    classifier, generator, config = CLASSIFIERS[name]
    small = twin_config(config, num_layers=2)
    whole, other = classifier(small).eval(), generator(small)
    assert classifies_by_decoder(whole)
    assert not classifies_by_decoder(other)
    roles = [
        {site.path.removeprefix("transformer."): site.role for site in map_model(m).sites}
        for m in (whole, other)
    ]
    trunk = {path: role for path, role in roles[1].items() if "lm_head" not in path}
    assert roles[0].items() >= trunk.items()
    assert "cross_attention.query" in trunk.values()
    assert len(spot_check(whole, map_model(whole))) == 2
    long = torch.randint(10, 90, (1, 80))
    assert len(spot_check(whole, map_model(whole), {"input_ids": long})) == 2, "cut before its end"


def test_a_classifying_twin_tells_its_two_sequences_apart_and_is_plain_where_asked():
    classifier, _, config = CLASSIFIERS["t5"]
    lengths = []
    for told_apart in (True, False):
        twin = build_twin(classifier, twin_config(config), told_apart=told_apart)
        inputs = twin_inputs(twin)
        assert (inputs["input_ids"] == twin.config.eos_token_id).sum(1).tolist() == [1, 1]
        assert "decoder_input_ids" not in inputs
        with torch.no_grad():
            lengths.append(twin(**inputs).encoder_last_hidden_state.shape[1])
    assert lengths == [15, 12]
