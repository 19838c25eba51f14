"""HybridExtension: LoRA beside a layer, the layer a model's own or one in several."""

import pytest
import torch
from extension_models import awaken, config, extension, logits, state_of, train, trainable, unchanged

import tiny_models
from peftlab.errors import CheckpointError, InputError, MethodError, TargetError
from peftlab.extensions.bundles import record_of
from peftlab.extensions.hybrid import HybridExtension


def layer_of(model):
    """The tensors of a model's new layer, by name in the base."""
    return dict(record_of(model).attachment.layers.parameters)


def same_storage(one, other):
    pairs = layer_of(one), layer_of(other)
    return pairs[0].keys() == pairs[1].keys() and all(p is pairs[1][name] for name, p in pairs[0].items())


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_a_shared_layer_is_the_same_tensors_and_goes_on_training(name):
    base = tiny_models.build(name)
    made = HybridExtension(base, config("hybrid"))
    layer = awaken(extension("new_layer", base).add_layer("python"))
    answers = logits(layer, name)
    before = state_of(layer)
    model = made.create_hybrid_model("javascript", use_shared_layer=True, shared_layer_model=layer)
    assert unchanged(before, layer)
    assert same_storage(model, layer)
    torch.testing.assert_close(logits(model.eval(), name), answers, rtol=0, atol=1e-5)
    start = {n: p.clone() for n, p in layer_of(layer).items()}
    train(model, name, steps=4)
    assert all(not torch.equal(start[n], p) for n, p in layer_of(layer).items())
    assert all(p.requires_grad for p in layer_of(layer).values())
    assert not torch.equal(logits(layer, name), answers)  # what trained the one shows in the other
    assert torch.equal(logits(base, name), logits(tiny_models.build(name), name))


def test_it_goes_the_other_way_too_and_among_three():
    base = tiny_models.build("t5")
    made = HybridExtension(base, config("hybrid"))
    first = made.create_hybrid("python")
    second = made.create_hybrid_from_existing(first, "javascript")
    third = made.create_hybrid_from_existing(second, "java")
    assert same_storage(first, third)
    answers = [logits(m.eval(), "t5") for m in (first, second, third)]
    train(first, "t5")
    assert all(
        not torch.equal(logits(m, "t5"), a) for m, a in zip((first, second, third), answers, strict=True)
    )
    lora = [{p.data_ptr() for n, p in trainable(m).items() if ".lora_" in n} for m in (first, second, third)]
    assert not lora[0] & lora[1] | lora[1] & lora[2] | lora[0] & lora[2]
    third_own = made.create_hybrid("java")
    assert not same_storage(first, third_own)


def test_a_trained_head_is_where_a_hybrid_on_its_layer_begins():
    """BERT's head is trained as a copy: the hybrid has its own, with the other's values."""
    base = tiny_models.build("bert")
    first = awaken(HybridExtension(base, config("hybrid")).create_hybrid("python"))
    second = (
        HybridExtension(base, config("hybrid", lora_r=1))
        .create_hybrid_from_existing(first, "javascript")
        .eval()
    )
    heads = [{n: p for n, p in trainable(m).items() if "classifier" in n} for m in (first, second)]
    assert heads[0].keys() == heads[1].keys() != set()
    for name, parameter in heads[0].items():
        assert torch.equal(parameter, heads[1][name])
        assert parameter.data_ptr() != heads[1][name].data_ptr()


def test_two_positions_are_shared_and_a_contradiction_is_refused():
    base = tiny_models.build("t5")
    layer = awaken(extension("new_layer", base, layer_position="both").add_layer("python"))
    model = HybridExtension(base, config("hybrid", layer_position="both")).create_hybrid_from_existing(
        layer, "sql"
    )
    assert same_storage(model, layer)
    with pytest.raises(
        MethodError, match="layer_position='decoder', but the existing layer stands in encoder, decoder"
    ):
        HybridExtension(base, config("hybrid", layer_position="decoder")).create_hybrid_from_existing(
            layer, "sql"
        )


def test_what_cannot_be_shared_is_refused():
    base = tiny_models.build("t5")
    made = HybridExtension(base, config("hybrid"))
    layer = extension("new_layer", base).add_layer("python")
    flags = [p.requires_grad for p in layer.parameters()]
    for model, said in (
        (base, "no new layer of an extension"),
        (extension("lora", base).create_adapter("python"), "no new layer of an extension"),
        (extension("new_layer", base, freeze_base=False).add_layer("python"), "freeze_base=False"),
        (extension("new_layer", tiny_models.build("t5", seed=1)).add_layer("python"), "another base"),
    ):
        with pytest.raises(MethodError, match=said):
            made.create_hybrid_from_existing(model, "sql")
    with pytest.raises(TargetError, match="nowhere"):
        HybridExtension(base, config("hybrid", lora_target_modules="nowhere")).create_hybrid_from_existing(
            layer, "sql"
        )
    assert [p.requires_grad for p in layer.parameters()] == flags
    with pytest.raises(InputError, match="use_shared_layer=True needs shared_layer_model"):
        made.create_hybrid_model("sql", use_shared_layer=True)
    with pytest.raises(InputError, match="no effect without use_shared_layer=True"):
        made.create_hybrid_model("sql", shared_layer_model=layer)
    same_weights = extension("new_layer", tiny_models.build("t5")).add_layer("python")
    made.create_hybrid_from_existing(same_weights, "sql")  # another object, bit-equal: the same base


def test_a_layer_that_was_to_be_shared_trains_on_after_a_failure(monkeypatch):
    """peft has frozen it by then."""
    base = tiny_models.build("gpt2")
    layer = extension("new_layer", base).add_layer("python")
    before = state_of(layer)

    def fail(model):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("peftlab.attaching.attachment.map_model", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        HybridExtension(base, config("hybrid")).create_hybrid_from_existing(layer, "sql")
    assert unchanged(before, layer)


def test_a_saved_hybrid_stands_alone_or_on_the_layer_that_is_still_the_same(tmp_path):
    base = tiny_models.build("t5")
    made = HybridExtension(base, config("hybrid", tmp_path))
    layer = awaken(extension("new_layer", base).add_layer("python"))
    model = awaken(made.create_hybrid_from_existing(layer, "sql"))
    made.save_hybrid_model(model, "sql")
    answers = logits(model, "t5")
    alone = HybridExtension(tiny_models.build("t5"), config("hybrid", tmp_path)).load_hybrid_model("sql")
    assert torch.equal(logits(alone, "t5"), answers)
    on_layer = made.load_hybrid_model("sql", layer)
    assert torch.equal(logits(on_layer, "t5"), answers)
    assert same_storage(on_layer, layer)
    before = {n: p.clone() for n, p in layer_of(layer).items()}
    with torch.no_grad():
        layer_of(layer)["encoder.block.2.layer.0.layer_norm.weight"].add_(1)
    with pytest.raises(
        CheckpointError, match=r"1 of \d+ tensors differ, such as encoder.block.2.layer.0.layer_norm"
    ):
        made.load_hybrid_model("sql", layer)
    changed = {n for n, p in layer_of(layer).items() if not torch.equal(p, before[n])}
    assert changed == {"encoder.block.2.layer.0.layer_norm.weight"}


def test_an_unfrozen_hybrid_on_a_layer_trains_a_base_of_its_own(tmp_path):
    base = tiny_models.build("gpt2")
    layer = extension("new_layer", base).add_layer("python")
    made = HybridExtension(base, config("hybrid", tmp_path, freeze_base=False))
    model = train(made.create_hybrid_from_existing(layer, "sql"), "gpt2")
    assert same_storage(model, layer)
    assert torch.equal(logits(base, "gpt2"), logits(tiny_models.build("gpt2"), "gpt2"))
    made.save_hybrid_model(model, "sql")
    for loaded in (made.load_hybrid_model("sql"), made.load_hybrid_model("sql", layer)):
        assert torch.equal(logits(loaded, "gpt2"), logits(model, "gpt2"))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_it_generates_with_its_cache(name):
    base = tiny_models.build(name)
    model = awaken(HybridExtension(base, config("hybrid")).create_hybrid("python"))
    given = {k: v for k, v in tiny_models.inputs(name).items() if k != "decoder_input_ids"}
    answers = [
        model.generate(**given, do_sample=False, max_new_tokens=5, min_new_tokens=5, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*answers)
