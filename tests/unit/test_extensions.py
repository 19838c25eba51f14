"""The model extensions: a model for each task on one base that never changes, and what it costs."""

import copy
import logging

import peft
import pytest
import torch
import transformers as T
from extension_models import (
    FACES,
    NAMES,
    awaken,
    config,
    create,
    extension,
    logits,
    save,
    state_of,
    train,
    trainable,
    unchanged,
)

import peftlab
import tiny_models
from peftlab.errors import ConfigError, MethodError, TargetError
from peftlab.extensions.bundles import count, record_of
from peftlab.extensions.structure import copy_structure


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "hybrid") for name in NAMES),
        ("t5", "lora"),
        ("bert", "lora"),
        ("gpt2", "new_layer"),
        ("bert", "new_layer"),
    ],
)
def test_models_of_tasks_leave_the_base_alone_and_share_its_weights(name, kind):
    base = tiny_models.build(name).train()
    next(base.parameters()).requires_grad_(False)  # a flag to keep
    before, answers = state_of(base), logits(base.eval(), name)
    base.train()
    made = extension(kind, base)
    models = [create(kind, made, task) for task in ("python", "javascript")]
    for model in models:
        torch.testing.assert_close(logits(model.eval(), name), answers, rtol=0, atol=1e-5)
    moved = [train(model, name) for model in models]
    assert unchanged(before, base)
    assert torch.equal(logits(base.eval(), name), answers)
    assert all(not torch.equal(logits(model, name), answers) for model in moved)
    trunk = (
        p for n, p in base.named_parameters() if not n.startswith("classifier.")
    )  # a head is trained as a copy
    own = {p.data_ptr() for p in trunk}
    for model in models:
        assert own <= {p.data_ptr() for p in model.parameters()}
        added = {p.data_ptr() for p in model.parameters()} - own
        assert {p.data_ptr() for p in trainable(model).values()} <= added
    first, second = ({p.data_ptr() for p in trainable(model).values()} for model in models)
    assert not first & second


def test_a_task_trains_as_if_it_were_alone():
    """Isolated tasks: the second changes nothing in the first, bit by bit."""
    base = tiny_models.build("t5")
    made = extension("hybrid", base)
    torch.manual_seed(1)
    first = train(create("hybrid", made, "python"), "t5")
    answers = logits(first, "t5")
    train(create("hybrid", made, "javascript"), "t5")
    assert torch.equal(logits(first, "t5"), answers)


@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "hybrid"), ("llama", "new_layer"), ("bert", "lora"), ("bert", "new_layer")]
)
def test_an_unfrozen_base_is_the_models_own(name, kind, tmp_path):
    base = tiny_models.build(name)
    before = state_of(base)
    made = extension(kind, base, tmp_path, freeze_base=False)
    model = create(kind, made)
    record = record_of(model)
    whole = count(record)["whole"] if name == "bert" else 0
    assert (
        count(record)["base"] == sum(p.numel() for p in base.parameters()) - whole
    )  # a head is trained as a copy
    own = {n: p.clone() for n, p in record.unfrozen.items()}
    assert all(p.requires_grad for p in record.unfrozen.values())
    train(model, name)
    assert all(not torch.equal(own[n], p) for n, p in record.unfrozen.items())
    assert unchanged(before, base)
    assert not {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in record.unfrozen.values()}
    save(kind, made, model)
    loaded = getattr(extension(kind, tiny_models.build(name), tmp_path), FACES[kind].load)("python")
    assert torch.equal(logits(loaded, name), logits(model, name))
    assert trainable(loaded).keys() == trainable(model).keys()


def test_lora_is_what_peft_makes_by_hand():
    """Float64: the same start, and the same bits after three steps."""
    base = tiny_models.build("t5").double()
    model = extension("lora", base, lora_r=3, lora_alpha=12).create_adapter("python")
    by_hand = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=3, lora_alpha=12, lora_dropout=0.0, target_modules=["q", "k", "v", "o", "wi", "wo"],
            task_type="SEQ_2_SEQ_LM",
        ),
    )  # fmt: skip
    assert trainable(model).keys() == trainable(by_hand).keys()
    with torch.no_grad():
        for name, parameter in trainable(by_hand).items():
            parameter.copy_(trainable(model)[name])
    for each in (model, by_hand):
        train(each, "t5")
    assert torch.equal(logits(model, "t5"), logits(by_hand, "t5"))
    assert all(torch.equal(p, trainable(by_hand)[name]) for name, p in trainable(model).items())


@pytest.mark.parametrize("gated", [True, False])
def test_what_the_document_names_on_t5_is_what_none_means(gated):
    settings = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    base = T.T5ForConditionalGeneration(
        T.T5Config(**settings, feed_forward_proj="gated-gelu" if gated else "relu")
    )
    model = extension("lora", base).create_adapter("python")
    adapted = {path.rpartition(".")[2] for path in model.base_model.targeted_module_names}
    inner = {"wi_0", "wi_1"} if gated else {"wi"}
    assert adapted == {"q", "k", "v", "o", "wo"} | inner
    named = extension("lora", base, lora_target_modules=sorted(adapted)).create_adapter("python")
    assert named.base_model.targeted_module_names == model.base_model.targeted_module_names


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(TargetError, match="q_projection"):
        extension("lora", tiny_models.build("t5"), lora_target_modules=["q_projection"]).create_adapter(
            "python"
        )


@pytest.mark.parametrize(
    ("name", "position", "stacks"),
    [
        ("t5", "decoder", {"decoder"}),
        ("bart", "both", {"encoder", "decoder"}),
        ("t5", "encoder", {"encoder"}),
    ],
)
def test_a_layer_stands_where_the_config_says(name, position, stacks):
    base = tiny_models.build(name)
    model = extension("new_layer", base, layer_position=position).add_layer("python")
    record = record_of(model)
    assert {grown.stack for grown in record.attachment.layers.grown} == stacks
    reached = train(model, name)
    assert not torch.equal(logits(reached, name), logits(base, name))


@pytest.mark.parametrize(
    ("name", "fits", "other"), [("llama", "decoder", "encoder"), ("bert", "encoder", "decoder")]
)
def test_one_stack_is_taken_untouched_or_by_what_it_is(name, fits, other):
    base = tiny_models.build(name)
    for changes in ({}, {"layer_position": fits}):
        extension("new_layer", base, **changes).add_layer("python")
    with pytest.raises(MethodError, match=rf"layer_position: there is no stack '{other}'"):
        extension("new_layer", base, layer_position=other).add_layer("python")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_scale_begins_as_the_identity_unless_it_is_set(name):
    base = tiny_models.build(name)
    answers = logits(base, name)
    for changes, moves in (
        ({}, False),
        ({"layer_initialization_scale": 0}, False),
        ({"layer_initialization_scale": 0.01}, True),
        ({"layer_initialization_scale": 0.5}, True),
    ):
        model = extension("new_layer", base, **changes).add_layer("python")
        assert (float((logits(model, name) - answers).abs().max()) > 1e-5) is moves


def test_bases_that_cannot_be_extended_are_refused():
    for base, said in (
        (torch.nn.Linear(2, 2), r"EfficientFineTuningManager"),
        (T.BertModel(tiny_models.build("bert").config), r"neither generates text nor classifies"),
    ):
        with pytest.raises(MethodError, match=said):
            extension("lora", base)
    made = extension("lora", tiny_models.build("gpt2"))
    with pytest.raises(MethodError, match="transformers model"):
        extension("lora", made.create_adapter("python"))
    adapted = tiny_models.build("gpt2")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), adapted)
    with pytest.raises(MethodError, match="carries adapters already"):
        extension("lora", adapted).create_adapter("python")


def test_ties_stay_ties_in_a_copy_of_the_structure():
    base = tiny_models.build("llama_tied")
    for own in (False, True):
        made = copy_structure(base, own=own)
        assert made.lm_head.weight is made.model.embed_tokens.weight
        assert (made.lm_head.weight.data_ptr() == base.lm_head.weight.data_ptr()) is not own
        assert torch.equal(logits(made, "llama"), logits(base, "llama"))


def test_a_copy_of_a_model_is_a_model_of_its_own():
    made = extension("lora", tiny_models.build("gpt2"))
    model = made.create_adapter("python")
    other = copy.deepcopy(model)
    assert record_of(other).attachment.model is other
    assert record_of(other).base is record_of(model).base
    answers = logits(awaken(model), "gpt2")
    assert not torch.equal(logits(other, "gpt2"), answers)


def flan_t5_small():
    config_of = T.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    with torch.device("meta"):
        model = T.T5ForConditionalGeneration(config_of)
    model.lm_head.weight = torch.nn.Parameter(
        torch.empty_like(model.shared.weight)
    )  # 5.23 ties it in any case
    return model


def test_counts_and_the_documents_log_line(caplog):
    base = flan_t5_small()
    caplog.set_level(logging.INFO, logger="peftlab")
    found = {}
    for kind in FACES:
        changes = {} if kind == "new_layer" else {"lora_r": 8, "lora_target_modules": "attention"}
        found[kind] = count(record_of(create(kind, extension(kind, base, **changes))))
    assert found["lora"] == {"lora": 688_128, "new_layer": 0, "whole": 0, "base": 0}
    assert found["new_layer"] == {"lora": 0, "new_layer": 2_360_320, "whole": 0, "base": 0}
    assert found["hybrid"] == {"lora": 688_128 + 28_672, "new_layer": 2_360_320, "whole": 0, "base": 0}
    assert "Hybrid model created: 3,077,120 trainable parameters" in caplog.messages
    assert any(
        "lora 716,800, new_layer 2,360,320; 4.00% of the base's 76,961,152" in m for m in caplog.messages
    )
    assert sum(p.numel() for p in base.parameters()) == 76_961_152


def test_one_call_gives_what_the_classes_give():
    base = tiny_models.build("t5")
    calls = {
        "lora": peftlab.create_lora_adapter,
        "new_layer": peftlab.create_extended_model,
        "hybrid": peftlab.create_hybrid_model,
    }
    for kind, call in calls.items():
        torch.manual_seed(3)
        one = call(base, "python", config(kind))
        torch.manual_seed(3)
        other = create(kind, extension(kind, base))
        assert trainable(one).keys() == trainable(other).keys()
        assert all(torch.equal(p, trainable(other)[n]) for n, p in trainable(one).items())
    shared = peftlab.create_hybrid_model(base, "javascript", None, None, True, one)
    assert record_of(shared).kind == "hybrid"
    assert record_of(peftlab.create_lora_adapter(base, "python")).settings["rank"] == 16


def test_every_start_is_drawn_anew_and_a_seed_repeats_it():
    made = extension("lora", tiny_models.build("gpt2"))
    starts = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        starts.append(torch.cat([p.flatten() for p in trainable(create("lora", made)).values()]))
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])


def test_what_has_no_effect_is_refused_when_it_is_set_and_when_it_is_used():
    base = tiny_models.build("gpt2")
    with pytest.raises(ConfigError, match="lora_r has no effect in TransformerLayerExtension"):
        FACES["new_layer"].extension(base, peftlab.ExtensionConfig(lora_r=16))  # the default, but by hand
    with pytest.raises(
        ConfigError, match="layer_position, layer_initialization_scale have no effect in LoRAExtension"
    ):
        FACES["lora"].extension(
            base, peftlab.ExtensionConfig(layer_position="encoder", layer_initialization_scale=0.01)
        )
    made = extension("lora", base)
    made.config.layer_position = "decoder"
    with pytest.raises(ConfigError, match="layer_position has no effect"):
        made.create_adapter("python")
