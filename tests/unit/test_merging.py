"""`merge`: the adapter's effect in the base's own weights, nothing of the adapter left; or refused, with nothing changed."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers.utils import logging

import tiny_models
from peftlab.attaching.merging import fold
from peftlab.attaching.peft_types import peft_type_names
from peftlab.attaching.wide_copies import read_whole
from peftlab.catalog import METHODS
from peftlab.errors import MethodError, NonFiniteError
from peftlab.mapping import map_model
from peftlab.settings import validate

DOUBLE = torch.float64
NOT_MERGED = {
    "adaption_prompt": "peft cannot merge adaption_prompt into the weights of a base",
    "beft": "peft cannot merge beft into 'model.layers.0.mlp.gate_proj' .Base layer has no bias",
    "cartridge": "cartridge trains what the model reads beside a text",
}
FLOAT32_INSIDE = {"c3a": 1e-5, "deft": 1e-5, "psoft": 1e-5}
"""Types that compute in float32 whatever the base is, and how far their logits may be apart."""
CONFIGS = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2}, "c3a": {"block_size": 8}, "miss": {"r": 4},
    "cartridge": {"num_virtual_tokens": 5}, "fourierft": {"n_frequency": 10}, "gralora": {"r": 4}, "psoft": {"r": 4},
    "oft": {"oft_block_size": 4}, "road": {"group_size": 8}, "trainable_tokens": {"token_indices": [33, 43]},
    "vblora": {"vector_length": 8, "num_vectors": 10}, "waveft": {"n_frequency": 10},
}  # fmt: skip


def attach(method, name="llama", *, dtype=DOUBLE, model=None, size=0.05, **settings):
    """A method on a tiny base, its tensors moved off their start."""
    leaf, model = METHODS.load(method), model or tiny_models.build(name).to(dtype)
    chosen = validate(leaf.Settings, settings)
    attached = leaf.attach(model, map_model(model), chosen, head=tiny_models.HEADS[name], seed=3)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            noise = torch.randn(parameter.shape, generator=source).to(parameter.dtype)
            parameter.add_(size * noise)
    attached.model.eval()
    return model, attached


@torch.no_grad()
def logits(model, name="llama"):
    return model(**tiny_models.inputs(name)).logits


def reloaded(model, folder, dtype=DOUBLE):
    """What plain transformers saves and loads of a model."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    return loaded.eval()


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# -- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", "llama_tied"), ("lora", "gpt2"), ("lora", "t5"), ("ia3", "t5"), ("adalora", "llama_tied")],
)
def test_a_tied_embedding_that_was_trained_whole_stays_tied_and_right(method, name, tmp_path):
    base, attached = attach(method, name, targets="all")
    expected = logits(attached.model, name)
    merged = attached.merge()
    assert merged is base
    reference = tiny_models.build(name)
    assert list(merged.state_dict()) == list(reference.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in reference.modules()]
    assert [p.requires_grad for p in merged.parameters()] == [True] * len(list(reference.parameters()))
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    torch.testing.assert_close(logits(merged, name), expected, rtol=0, atol=1e-10)
    loaded = reloaded(merged, tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    torch.testing.assert_close(logits(loaded, name), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "ia3"])
def test_a_new_head_stays_as_it_was_trained(method):
    base, attached = attach(method, "bert")
    expected = logits(attached.model, "bert")
    torch.testing.assert_close(logits(attached.merge(), "bert"), expected, rtol=0, atol=1e-10)
    assert not torch.equal(base.classifier.weight, tiny_models.build("bert").classifier.weight.double())


def test_experts_held_as_3_d_parameters():
    base, attached = attach("lora", "mixtral", dtype=torch.float32)
    expected = logits(attached.model, "mixtral")
    torch.testing.assert_close(logits(attached.merge(), "mixtral"), expected, rtol=0, atol=1e-5)
    assert not torch.equal(
        base.model.layers[0].mlp.experts.down_proj,
        tiny_models.build("mixtral").model.layers[0].mlp.experts.down_proj,
    )
    assert list(base.state_dict()) == list(tiny_models.build("mixtral").state_dict())


@pytest.mark.parametrize("name", [n for n in peft_type_names() if n not in METHODS.names()])
def test_every_type_of_peft_merges_or_says_why_not(name):
    dtype = torch.float32 if name == "psoft" else DOUBLE
    try:
        base, attached = attach("peft", dtype=dtype, type=name, config=CONFIGS.get(name, {}))
    except MethodError:
        pytest.skip("does not work here at all: test_peft_types.py says why")
    expected, before = logits(attached.model), state(base)
    if name in NOT_MERGED:
        with pytest.raises(MethodError, match=NOT_MERGED[name]):
            attached.merge()
        assert same(state(base), before)
        assert torch.equal(logits(attached.model), expected)
        return
    merged = attached.merge()
    assert (expected - logits(tiny_models.build("llama").to(dtype))).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=FLOAT32_INSIDE.get(name, 1e-10))
    reference = tiny_models.build("llama")
    assert [type(m) for m in merged.modules()] == [type(m) for m in reference.modules()]
    assert list(merged.state_dict()) == list(reference.state_dict())


def test_full_and_bitfit_let_go_of_the_originals():
    for method in ("full", "bitfit"):
        base, attached = attach(method)
        trained = state(base)
        assert attached.originals_bytes > 0
        assert same(state(attached.merge()), trained)
        assert attached.originals_bytes == 0
        assert attached.rewritten == ()


# -- what is over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "new_layer", "hybrid", "peft"])
def test_a_merged_adapter_is_over(method):
    base, attached = attach(method)
    attached.merge()
    kept = state(base)
    with pytest.raises(
        MethodError, match=r"has been merged: .* can not be removed any more; load the base anew"
    ):
        attached.remove()
    with pytest.raises(MethodError, match=r"has been merged: .* can not be merged any more"):
        attached.merge()
    with pytest.raises(MethodError, match=r"can not be switched off any more"), attached.disabled():
        pass
    assert same(state(base), kept)


@pytest.mark.parametrize("method", ["lora", "full", "new_layer", "hybrid", "prompt_tuning", "peft"])
def test_a_removed_adapter_cannot_be_merged(method):
    base, attached = attach(method)
    attached.remove()
    with pytest.raises(
        MethodError, match=r"has been removed: there is nothing to be merged; attach it again"
    ):
        attached.merge()
    assert same(state(base), state(tiny_models.build("llama").double()))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_prompt_is_in_no_weight(method):
    base, attached = attach(method)
    expected = logits(attached.model)
    with pytest.raises(
        MethodError, match=rf"{method} trains what the model reads .* keep it beside the base"
    ):
        attached.merge()
    assert torch.equal(logits(attached.model), expected)
    assert attached.remove() is base


# -- guards --------------------------------------------------------------------------------------------------------


def test_a_weight_that_another_module_uses_is_refused_by_name():
    model = tiny_models.build("llama_tied").double()
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapted = peft.get_peft_model(model, config)
    before, expected = state(model), logits(adapted)
    with pytest.raises(
        MethodError, match=r"'model.embed_tokens' is tied: lm_head, model.embed_tokens share it"
    ):
        fold(adapted, "lora")
    assert same(state(model), before)
    assert torch.equal(logits(adapted), expected)


def test_values_that_are_not_finite_are_refused_and_nothing_changes():
    for method in ("lora", "full", "new_layer", "hybrid"):
        base, attached = attach(method)
        name, parameter = list(attached.parameters().items())[-1]
        with torch.no_grad():
            parameter.view(-1)[0] = float("nan")
        before = {n: t for n, t in state(base).items() if torch.isfinite(t).all()}
        with pytest.raises(NonFiniteError, match="not finite"):
            attached.merge()
        assert name in attached.parameters()
        assert all(torch.equal(base.state_dict()[n], t) for n, t in before.items())


def test_a_sum_beyond_half_precision_is_undone():
    base, attached = attach("lora", dtype=torch.float16, size=1e3)
    before = state(base)
    assert all(torch.isfinite(p).all() for p in attached.parameters().values())
    with pytest.raises(NonFiniteError, match=r"the weight of '.*' would not be finite: lora is not merged"):
        attached.merge()
    assert same(state(base), before)
    assert all(p.dtype == torch.float16 for n, p in base.named_parameters() if "lora_" not in n)
    assert not any(getattr(m, "merged", False) for m in base.modules())
    assert same(state(attached.remove()), state(tiny_models.build("llama").half()))


def test_a_half_precision_base_is_added_up_in_float32_and_rounded_once():
    model, attached = attach("lora", dtype=torch.bfloat16, size=0.2)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    with read_whole(layer):
        update = layer.get_delta_weight("default").detach()
    assert update.dtype == torch.float32
    expected = logits(attached.model)
    merged = attached.merge()
    found = merged.model.layers[0].mlp.up_proj.weight
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (before.float() + update).bfloat16())
    assert not torch.equal(found, before + update.bfloat16()), "what peft's own merge gives"
    torch.testing.assert_close(logits(merged), expected, rtol=0.1, atol=0.1)


def test_an_update_that_rounding_would_swallow_is_refused():
    model, attached = attach("lora", dtype=torch.bfloat16, size=1e-4)
    before, expected = state(model), logits(attached.model)
    with pytest.raises(MethodError, match=r"would miss \d+% of what lora adds to them; load the base"):
        attached.merge()
    assert same(state(model), before)
    assert torch.equal(logits(attached.model), expected)


# -- new blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [("new_layer", "llama"), ("hybrid", "llama"), ("hybrid", "gpt2"), ("new_layer", "t5")],
)
def test_a_merged_block_is_a_layer_of_a_plain_model(method, name, tmp_path):
    base, attached = attach(method, name)
    expected = logits(attached.model, name)
    merged = attached.merge()
    assert merged is base
    depth = getattr(base.config, "num_hidden_layers", None)
    assert depth == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    torch.testing.assert_close(logits(merged, name), expected, rtol=0, atol=1e-10)
    loaded = reloaded(merged, tmp_path)
    torch.testing.assert_close(logits(loaded, name), expected, rtol=0, atol=1e-10)
    given = {"input_ids": tiny_models.inputs(name)["input_ids"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(merged.generate(**given), loaded.generate(**given))
    assert set(map_model(loaded).stacks.values()) == ({2, 3} if name == "t5" else {3})


def test_a_merged_block_can_be_followed_by_another():
    base, attached = attach("new_layer")
    attached.merge()
    _, again = attach("new_layer", model=base)
    assert base.config.num_hidden_layers == 4
    again.remove()
    assert base.config.num_hidden_layers == 3


def test_a_gate_must_be_one():
    base, attached = attach("new_layer", "bert")
    expected = logits(base, "bert")
    for method_call in (attached.merge, attach("hybrid", "bert")[1].merge):
        with pytest.raises(
            MethodError, match=r"residual_gate is .*: the block is added to its input in part"
        ):
            method_call()
    assert torch.equal(logits(base, "bert"), expected)
    with torch.no_grad():
        gate = next(p for n, p in attached.parameters().items() if n.endswith("residual_gate"))
        gate.fill_(1.0)
    expected = logits(base, "bert")
    torch.testing.assert_close(logits(attached.merge(), "bert"), expected, rtol=0, atol=1e-10)
    assert not any("residual_gate" in name for name in base.state_dict())


def test_a_block_that_no_plain_model_has_there_is_refused():
    """At the start of a T5, the new block would have the relative bias and the old first block would keep its own."""
    base, attached = attach("new_layer", "t5", position="start")
    expected = logits(base, "t5")
    with pytest.raises(
        MethodError, match=r"a plain T5ForConditionalGeneration of its config is not this model: '"
    ):
        attached.merge()
    assert torch.equal(logits(base, "t5"), expected)
    attached.remove()


def test_a_block_takes_the_base_s_dtype_and_its_own_storage():
    base, attached = attach("new_layer", dtype=torch.bfloat16)
    block, parameters = base.model.layers[2], attached.parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    attached.merge()
    assert base.model.layers[2] is block
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert not {id(p) for p in block.parameters()} & {id(p) for p in parameters.values()}
    assert logits(base).dtype == torch.bfloat16


def test_companion_a_merge_that_changes_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr("peftlab.attaching.merging._fold_layers", lambda *_: None)
    _, attached = attach("lora")
    expected = logits(attached.model)
    assert (logits(attached.merge()) - expected).abs().max() > 1e-3


def test_companion_a_tie_that_is_cut_is_noticed():
    base, attached = attach("lora", "llama_tied", targets="all")
    attached.merge()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    assert base.get_input_embeddings().weight is not base.get_output_embeddings().weight
