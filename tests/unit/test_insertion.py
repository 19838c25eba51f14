"""New blocks in a live stack: the identity at the start, the base bit-equal, cache, configs and indexes right."""

import copy
import json

import pytest
import torch
import transformers as T
from deeper_models import CASES, GATED, GENERATING, attach, build, generate, inputs, logits, perturb
from torch import nn

from peftlab.errors import ConfigError, MethodError
from peftlab.insertion import GATE, chosen_stacks, new_layers, stack_facts
from peftlab.insertion.trial import Trial
from peftlab.mapping import map_model
from peftlab.methods import new_layer
from peftlab.proof import fingerprint
from peftlab.settings import validate

PLACES = [("end", 1), ("start", 2), (1, 1)]


def new_ones(attached):
    return [block for grown in attached.layers.grown for block in grown.insertion.blocks]


@pytest.mark.parametrize(("position", "count"), PLACES)
@pytest.mark.parametrize(("name", "stack"), CASES)
def test_a_new_block_is_the_identity_and_can_work(name, stack, position, count):
    reference, base = build(name), build(name)
    expected = logits(reference, name)
    attached = attach(base, name, stack=stack, position=position, count=count)
    assert attached.model is base
    stacks = 2 if stack == "both" else 1
    assert len(new_ones(attached)) == stacks * count
    deeper = {key: value + count for key, value in map_model(reference).stacks.items()}
    assert sum(attached.family.stacks.values()) == sum(deeper.values()) - count * (len(deeper) - stacks)
    torch.testing.assert_close(logits(base, name), expected, rtol=0, atol=1e-5)
    assert {hasattr(block, GATE) for block in new_ones(attached)} == {GATED[name]}
    perturb(attached)
    assert (logits(base, name) - expected).abs().max() > 1e-3, "a block that has learnt is heard"


@pytest.mark.parametrize(("position", "count"), PLACES)
@pytest.mark.parametrize(("name", "stack"), [case for case in CASES if case[0] in GENERATING])
def test_what_is_generated_with_the_cache_is_what_is_generated_without(name, stack, position, count):
    base = build(name)
    expected = generate(build(name), name)
    attached = attach(base, name, stack=stack, position=position, count=count)
    assert generate(base, name) == expected, "at the start"
    perturb(attached)
    cached = generate(base, name)
    assert cached == generate(base, name, use_cache=False)
    with attached.disabled():
        assert generate(base, name) == expected
        assert torch.equal(logits(base, name), logits(build(name), name))
    assert generate(base, name) == cached


@pytest.mark.parametrize(("position", "count"), PLACES)
@pytest.mark.parametrize(("name", "stack"), CASES)
def test_the_base_comes_back(name, stack, position, count):
    reference, base = build(name), build(name)
    config, before = base.config, base.config.to_dict()
    required = {n: n.endswith("weight") for n, _ in base.named_parameters()}
    for n, p in base.named_parameters():
        p.requires_grad_(required[n])
    facts = {n: numbers(m) for n, m in base.named_modules()}
    attached = attach(base, name, stack=stack, position=position, count=count)
    trainable = {n for n, p in base.named_parameters() if p.requires_grad}
    assert trainable == set(attached.parameters()), "nothing else trains"
    perturb(attached)
    generate(base, name) if name in GENERATING else logits(base, name)
    assert attached.remove() is base
    assert base.config is config
    assert config.to_dict() == before
    assert {n: numbers(m) for n, m in base.named_modules()} == facts
    tensors, old = base.state_dict(), reference.state_dict()
    assert list(tensors) == list(old)
    assert [n for n in old if fingerprint(old[n]) != fingerprint(tensors[n])] == []
    assert {n: p.requires_grad for n, p in base.named_parameters()} == required
    assert torch.equal(logits(base, name), logits(reference, name))


def numbers(module):
    """The whole numbers that a module knows: its layer's index among them."""
    return {key: value for key, value in vars(module).items() if isinstance(value, int)}


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bart", "gemma2"])
def test_nothing_stands_around_a_block(name):
    base = build(name)
    attached = attach(base, name, position="start")
    for block in new_ones(attached):
        neighbour = type(attached.layers.grown[0].insertion._stack[1])
        assert type(block) is neighbour
        assert isinstance(block, T.modeling_layers.GradientCheckpointingLayer)
    assert not any("forward" in vars(module) for module in base.modules())
    assert "forward_with_checkpointing" in type(new_ones(attached)[0]).forward.__code__.co_name


def test_the_callers_config_is_left_alone():
    config = build("gemma2").config
    one, two = T.Gemma2ForCausalLM(config).eval(), T.Gemma2ForCausalLM(config).eval()
    before = json.dumps(config.to_dict(), default=str)
    attach(one, "gemma2", position=1)
    assert one.config.num_hidden_layers == 4
    assert one.config.layer_types == [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert one.model.config is one.config is one.model.layers[1].self_attn.config
    assert json.dumps(config.to_dict(), default=str) == before
    assert two.config is config


@pytest.mark.parametrize(("name", "stack"), [("llama", None), ("gpt2", None), ("t5", "both"), ("opt", None)])
def test_a_deeper_model_without_gates_is_one_that_transformers_loads(name, stack, tmp_path):
    base = build(name)
    attached = attach(base, name, stack=stack)
    perturb(attached)
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, name), logits(base, name))
    assert generate(loaded, name) == generate(base, name)


def test_the_first_block_of_t5_computes_the_bias_of_the_base():
    base = build("t5")
    bias = base.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    attached = attach(base, "t5", position="start", count=2)
    for block in base.encoder.block[:3]:
        assert block.layer[0].SelfAttention.relative_attention_bias is bias
    assert bias.weight.requires_grad is False
    assert not any(p is bias.weight for p in attached.parameters().values())
    assert [b.layer[0].SelfAttention.layer_idx for b in base.encoder.block] == [0, 1, 2, 3, 4]


def test_hidden_states_have_the_new_block_in_them_whatever_was_asked_before():
    for asked_before in (False, True):
        base = build("bert")
        if asked_before:  # transformers puts its hooks on once, when hidden states are first asked for
            base(**inputs("bert"), output_hidden_states=True)
        attached = attach(base, "bert", position=1)
        perturb(attached)
        states = base(**inputs("bert"), output_hidden_states=True).hidden_states
        assert len(states) == 5
        with attached.disabled():
            assert len(base(**inputs("bert"), output_hidden_states=True).hidden_states) == 4
        gate = new_ones(attached)[0].residual_gate
        with torch.no_grad():
            gate.zero_()
        states = base(**inputs("bert"), output_hidden_states=True).hidden_states
        assert torch.equal(states[2], states[1]), "the state is the gated one"


def test_hooks_of_others_stay_where_they_are():
    base, seen = build("llama"), []
    base.model.layers[-1].mlp.register_forward_hook(lambda *call: seen.append(1))
    attach(base, "llama")
    logits(base, "llama")
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_random_and_scaled_starts(name):
    expected = logits(build(name), name)
    drawn = [attach(build(name), name, initialization="random", seed=seed) for seed in (1, 1, 2)]
    for attached in drawn:
        torch.testing.assert_close(logits(attached.model, name), expected, rtol=0, atol=1e-5)
    one, same, other = (attached.tensors() for attached in drawn)
    copied = attach(build(name), name).tensors()
    query = next(n for n in one if n.endswith(("q_proj.weight", "query.weight", "q.weight")))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one[query], other[query])
    assert not torch.equal(one[query], copied[query])
    gain = next(n for n in one if n.lower().endswith(("layernorm.weight", "layer_norm.weight")))
    assert torch.equal(one[gain], torch.ones_like(one[gain]))
    scaled = attach(build(name), name, initialization="scale", scale=0.001)
    difference = (logits(scaled.model, name) - expected).abs().max()
    assert 0 < difference < 0.05
    assert {scaled.steps_to_train(n) for n in scaled.parameters()} == {1}


def test_errors_say_what_is_wrong_and_leave_the_model_alone():
    base = build("t5")
    for settings, message in (
        ({"stack": "encodre"}, r"no stack 'encodre' in this t5 model \(did you mean 'encoder'\?\); there is: enc"),
        ({"position": 4}, "method.position 4 lies outside encoder.block: a new block can stand at 0 to 3"),
    ):  # fmt: skip
        with pytest.raises(MethodError, match=message):
            attach(base, "t5", **settings)
    for values, message in (
        ({"position": -1}, "an index counts from 0"),
        ({"position": "middle"}, "must be start, end or an index from 0"),
        ({"scale": 0.1}, "scale has no effect with initialization=copy"),
        ({"count": 0}, "count"),
        ({"stak": "encoder"}, "unknown key 'method.stak' .did you mean 'stack'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(new_layer.Settings, values, where="method")
    attach(base, "t5")
    with pytest.raises(MethodError, match=r"has (an adapter|new blocks) already"):
        attach(base, "t5", position="start")
    small = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    albert = T.AlbertForMaskedLM(T.AlbertConfig(**small, embedding_size=8))
    with pytest.raises(MethodError, match="its blocks run more than once"):
        attach(albert, "bert")
    with pytest.raises(MethodError, match=r"(has an adapter|layers of peft) already"):
        attach(attach(build("llama"), "llama", "lora").model, "llama")
    offloaded = build("llama")
    config = offloaded.config
    layer = offloaded.model.layers[-1]
    layer.forward = copy.copy(layer.forward)
    with pytest.raises(MethodError, match="load the model onto one device"):
        attach(offloaded, "llama")
    assert offloaded.config is config
    assert all(p.requires_grad for p in offloaded.parameters())


def test_an_unproved_model_is_refused():
    class Oddity(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

    model = Oddity()
    with pytest.raises(
        MethodError, match="what its blocks do is not proved, because it is not a transformers model"
    ):
        attach(model, "llama")


def test_a_stack_is_called_what_it_is():
    for name, right, wrong in (("llama", "decoder", "encoder"), ("bert", "encoder", "decoder")):
        family = map_model(build(name))
        assert chosen_stacks(family, right) == chosen_stacks(family, None) == ["layers"]
        with pytest.raises(MethodError, match=f"no stack '{wrong}'"):
            chosen_stacks(family, wrong)
        with pytest.raises(MethodError, match="no stack 'both'"):
            chosen_stacks(family, "both")


def test_a_half_precision_base_gets_blocks_whose_small_steps_count():
    base = build("llama").to(torch.bfloat16)
    expected = logits(base, "llama")
    attached = attach(base, "llama")
    assert {p.dtype for p in attached.parameters().values()} == {torch.float32}
    found = logits(base, "llama")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    perturb(attached, scale=0.05)
    assert generate(base, "llama") == generate(base, "llama", use_cache=False)
    with pytest.raises(TypeError, match="cannot unpack"):
        new_ones(attached)[0](torch.zeros(1, 2, 16, dtype=torch.bfloat16), position_embeddings=None)
    assert not torch.is_autocast_enabled("cpu"), "a forward that fails leaves no autocast behind"


# -- companions: the checks above notice a broken product --------------------------------------------------------


def test_companion_outputs_left_as_they_are_are_noticed(monkeypatch):
    monkeypatch.setattr(new_layers, "scale_outputs", lambda *_: None)
    base = build("llama")
    expected = logits(base, "llama")
    attach(base, "llama")
    assert (logits(base, "llama") - expected).abs().max() > 1e-3


def test_companion_a_zeroed_post_norm_block_is_not_the_identity(monkeypatch):
    """BERT's block with zeros for output projections still norms; the trial must say so."""
    real = new_layers.try_block
    monkeypatch.setattr(new_layers, "try_block", lambda *a, **k: Trial(real(*a, **k).facts, False))
    base = build("bert")
    expected = logits(base, "bert")
    attach(base, "bert")
    assert (logits(base, "bert") - expected).abs().max() > 1e-3


def test_companion_the_trial_refuses_a_model_whose_cache_it_cannot_count(monkeypatch):
    """Without the indexes a new block writes into its neighbour's cache."""
    monkeypatch.setattr("peftlab.insertion.trial._known", {})
    monkeypatch.setattr(stack_facts, "_index_names", lambda blocks: frozenset())
    with pytest.raises(
        MethodError, match="what it generates with the cache is not what it generates without"
    ):
        attach(build("llama"), "llama", position=1)


def test_companion_a_bias_of_its_own_is_noticed(monkeypatch):
    real = new_layers.copy_block
    monkeypatch.setattr(new_layers, "copy_block", lambda block, *, shared, kept: real(block, kept=kept))
    base = build("t5")
    first = base.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    attach(base, "t5", position="start")
    assert base.encoder.block[0].layer[0].SelfAttention.relative_attention_bias is not first
