"""new_layer and hybrid as attachments: what trains when, files, sharing, counts, runs."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from deeper_models import CASES, attach, build, generate, head, logits, perturb, training_inputs
from safetensors.torch import load_file, save_file

from peftlab.attaching.combining import HybridAttachment
from peftlab.attaching.extending import LAYER_CONFIG, LAYER_FILE, read_layer_config, share_layers
from peftlab.errors import CheckpointError, MethodError, ScheduleError
from peftlab.gradients import GradientGroups, read_gradients
from peftlab.insertion import new_layers
from peftlab.mapping import map_model
from peftlab.methods import hybrid, new_layer
from peftlab.phases import PhaseSwitch
from peftlab.proof import TrainingProof
from peftlab.schedule import GROUPS, PhaseSettings, Schedule, place_phases, strategy_phases
from tiny_runs import BOTH_MLP_ATTENTION, ONE_PHASE, run, same

METHODS = ("new_layer", "hybrid")
TARGETS = {"mixtral": "attention"}
"""Where LoRA's default finds no MLP."""


def settings_of(method, name, **more):
    small = {"rank": 2, "targets": TARGETS.get(name, "both")} if method == "hybrid" else {}
    return small | more


def train(attached, name, *, steps=None, rate=1e-2):
    """Steps in training mode, watched by law 1's proof."""
    parameters = attached.parameters()
    steps = steps or max(attached.steps_to_train(n) for n in parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate)
    proof, shown = TrainingProof(parameters, attached.steps_to_train), None
    proof.enter("all")
    attached.model.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad(set_to_none=True)
        attached.model(**training_inputs(name, seed=step)).loss.backward()
        proof.observe(read_gradients(parameters), step=step)
        optimizer.step()
        shown = proof.after_step(learning_rate=rate, step=step) or shown
    attached.model.eval()
    return shown


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "stack"), CASES)
def test_everything_trains_within_its_steps_and_nothing_else_does(name, stack, method):
    base = build(name)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    attached = attach(base, name, method, stack=stack, **settings_of(method, name))
    needed = {attached.steps_to_train(n) for n in attached.parameters()}
    assert needed == ({1, 2} if method == "new_layer" else {1, 2, 3})
    shown = train(attached, name)
    assert shown is not None
    assert shown.unreached == ()
    assert shown.tensors == len(attached.parameters())
    assert attached.remove() is base
    assert all(torch.equal(before[n], p) for n, p in base.named_parameters())
    assert torch.equal(logits(base, name), logits(build(name), name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_the_steps_that_a_tensor_needs_are_not_more_than_it_needs(name):
    """K is sharp: in the first step exactly the tensors of K = 1 have a gradient, and so on."""
    attached = attach(build(name), name, "hybrid", **settings_of("hybrid", name))
    parameters, late = attached.parameters(), {}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-2)
    for step in range(1, 4):
        optimizer.zero_grad()
        attached.model(**training_inputs(name)).loss.backward()
        for n, p in parameters.items():
            if p.grad is not None and p.grad.abs().max() > 0:
                late.setdefault(n, step)
        optimizer.step()
    assert late == {n: attached.steps_to_train(n) for n in parameters}


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_gradients_at_the_start_are_healthy(name):
    """Those of the zeroed projections are of the size of those in the block that was copied."""
    base = build(name)
    attached = attach(base, name)
    (grown,) = attached.layers.grown
    copied = base.get_submodule(f"{grown.path}.{grown.insertion.index - 1}")
    copied.requires_grad_(True)
    base(**training_inputs(name)).loss.backward()
    for path in grown.outputs:
        new, old = (m.get_submodule(path).weight.grad.norm() for m in (grown.insertion.blocks[0], copied))
        assert 0.1 < new / old < 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "stack"), [("llama", None), ("t5", "both"), ("bert", None), ("roberta", None), ("bart", "both")]
)
def test_saved_and_loaded_onto_a_new_base_it_answers_the_same(name, stack, method, tmp_path):
    asked = settings_of(method, name, stack=stack, position=1)
    attached = attach(build(name), name, method, **asked)
    perturb(attached, scale=0.1)
    attached.save(tmp_path)
    files = {LAYER_FILE, LAYER_CONFIG}
    files |= {"adapter_config.json", "adapter_model.safetensors"} if method == "hybrid" else set()
    assert {p.name for p in tmp_path.iterdir()} == files
    other = attach(build(name), name, method, seed=99, **asked)
    other.load_saved(tmp_path)
    assert torch.equal(logits(other.model, name), logits(attached.model, name))
    assert same(other.tensors(), attached.tensors())
    again = attach(build(name), name, "new_layer", **read_layer_config(tmp_path)["settings"])
    if head(name) != "classification" or method == "new_layer":
        again.load_saved(tmp_path)  # a hybrid's layer is a layer
        loaded = again.tensors()
        assert all(torch.equal(loaded[n], t) for n, t in attached.tensors().items() if n in loaded)


def test_plain_peft_loads_the_lora_of_a_hybrid_onto_the_deeper_base(tmp_path):
    attached = attach(build("llama"), "llama", "hybrid", rank=2)
    perturb(attached, scale=0.1)
    attached.save(tmp_path)
    base = build("llama")
    layer = attach(base, "llama")
    layer.load_saved(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits(loaded, "llama"), logits(attached.model, "llama"))


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_fit_is_refused_whole(method, tmp_path):
    attached = attach(build("t5"), "t5", method, **settings_of(method, "t5"))
    attached.save(tmp_path)
    before = attached.tensors()
    elsewhere = attach(build("t5"), "t5", method, position="start", **settings_of(method, "t5"))
    with pytest.raises(CheckpointError, match=r"stand elsewhere.*'layers': \[3\].*here.*'layers': \[0\]"):
        elsewhere.load_saved(tmp_path)
    tensors = load_file(tmp_path / LAYER_FILE)
    key = sorted(tensors)[0]
    for message, given in (
        (f"missing \\['{key}'\\]", {n: t for n, t in tensors.items() if n != key}),
        ("unexpected \\['nobody'\\]", tensors | {"nobody": torch.ones(1)}),
        (f"another shape \\['{key}'\\]", tensors | {key: torch.ones(3)}),
    ):
        save_file({n: t + 1 for n, t in given.items()}, tmp_path / LAYER_FILE)
        with pytest.raises(CheckpointError, match=message):
            attached.load_saved(tmp_path)
    assert same(attached.tensors(), before), "untouched by a refusal"
    content = json.loads((tmp_path / LAYER_CONFIG).read_text())
    (tmp_path / LAYER_CONFIG).write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(CheckpointError, match="version 9, this peftlab reads 1"):
        attached.load_saved(tmp_path)
    (tmp_path / LAYER_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"has no {LAYER_FILE}: it holds no new layer"):
        attached.load_saved(tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "stack"), [("llama", None), ("bert", None), ("t5", "both"), ("bart", "both")]
)
def test_gradients_under_checkpointing_are_the_same(name, stack, method):
    found = []
    for checkpointing in (False, True):
        attached = attach(build(name), name, method, stack=stack, **settings_of(method, name, position=1))
        perturb(attached, scale=0.1)
        if checkpointing:
            attached.model.activation_checkpointing_enable({"use_reentrant": False})
        attached.model.train()
        torch.manual_seed(0)
        attached.model(**training_inputs(name)).loss.backward()
        found.append({n: p.grad for n, p in attached.parameters().items()})
    assert all(grad is not None for grad in found[0].values())
    for n, grad in found[0].items():
        torch.testing.assert_close(found[1][n], grad, rtol=1e-4, atol=1e-6)


def flan_t5_small():
    config = T.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    with torch.device("meta"):
        model = T.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(
        torch.empty_like(model.shared.weight)
    )  # 5.23 ties it, whatever is asked
    return model


def test_counts_of_flan_t5_small():
    base = flan_t5_small()
    assert sum(p.numel() for p in base.parameters()) == 76_961_152
    layer = new_layer.attach(base, map_model(base), new_layer.Settings(), head="seq2seq", seed=0)
    assert sum(p.numel() for p in layer.parameters().values()) == 2_360_320
    layer.remove()
    assert sum(p.numel() for p in base.parameters()) == 76_961_152
    both = hybrid.attach(base, map_model(base), hybrid.Settings(targets="attention"), head="seq2seq", seed=0)
    assert both.counts == {"lora": 688_128 + 28_672, "new_layer": 2_360_320, "whole": 0}
    assert sum(p.numel() for p in both.parameters().values()) == 3_077_120
    more = hybrid.Settings(targets="attention", rank=4)
    base = flan_t5_small()
    assert hybrid.attach(base, map_model(base), more, head="seq2seq", seed=0).counts["lora"] != 716_800, (
        "companion"
    )


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in METHODS for n in ("llama", "t5", "bert", "bart")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(method: str, name: str, tmp_path: Path) -> None:
    setup: dict[str, Any] = {
        "method": method, "settings": settings_of(method, name), "phases": ONE_PHASE, "max_steps": 6, "validation_steps": 3,
    }  # fmt: skip
    whole = run(tmp_path / "whole", name, **setup, save_steps=1, keep=9)
    resumed = run(
        tmp_path / "resumed", name, resume=tmp_path / "whole" / "checkpoint-4", **setup, save_steps=6
    )
    assert same(resumed.tensors, whole.tensors)
    assert resumed.told("step")[-1]["loss"] == whole.told("step")[-1]["loss"]


def schedule(*phases: PhaseSettings) -> Schedule:
    return Schedule(place_phases(phases, total_steps=12), 12, 1e-2, 0)


def test_phases_reach_the_parts_of_a_new_block():
    attached = attach(build("llama"), "llama", count=2)
    parameters = attached.parameters()
    switch = PhaseSwitch(schedule(), attached.family, parameters)

    def trained(**settings):
        return {
            n.removeprefix("model.layers.")
            for n in switch.active(schedule(PhaseSettings(**settings)).phases[0])
        }

    assert {n.split(".")[1] for n in trained(groups=("attention",))} == {"self_attn"}
    assert {n.split(".")[1] for n in trained(groups=("mlp",))} == {"mlp"}
    assert {n.split(".")[0] for n in trained(groups=GROUPS, layers=(4, 4))} == {"4"}
    assert trained(groups=("attention.output",), layers=(3, 3)) == {
        f"3.self_attn.o_proj.{p}" for p in ("weight", "bias")
    }
    columns = GradientGroups(attached.family, parameters).columns
    assert columns == ["layer_3_attention", "layer_3_mlp", "layer_4_attention", "layer_4_mlp"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_three_phases(method, tmp_path):
    for name in ("llama", "bert"):
        asked = {"method": method, "settings": settings_of(method, name), "phases": BOTH_MLP_ATTENTION}
        done = run(tmp_path / name, name, **asked, warmup_steps=0)
        assert [proof["phase"] for proof in done.told("phase_proved")] == ["both", "mlp", "attention"]


def test_phases_that_could_never_train_are_refused():
    bert, llama = attach(build("bert"), "bert"), attach(build("llama"), "llama")
    first_attention = schedule(*strategy_phases("attn->mlp->both", total_steps=12))
    llama.begin(first_attention)
    stuck = "trains 8 tensors of the new block at layer 3 that have no gradient while residual_gate is zero"
    with pytest.raises(ScheduleError, match=stuck):
        bert.begin(first_attention)
    bert.begin(
        schedule(PhaseSettings(groups=("attention", "other"), steps=6), PhaseSettings(groups=("mlp",)))
    )
    with pytest.raises(ScheduleError, match=r"while self_attn\.o_proj is zero, such as .*q_proj"):
        llama.begin(schedule(PhaseSettings(groups=("attention.query",))))
    llama.begin(schedule(PhaseSettings(groups=("attention.query", "attention.output"))))


def test_layers_can_be_shared_between_two_bases():
    one, other = build("t5"), build("t5")
    first = attach(one, "t5", stack="both", position="start")
    second = share_layers(other, map_model(other), first, head="seq2seq", seed=0)
    assert {n: id(p) for n, p in first.parameters().items()} == {
        n: id(p) for n, p in second.parameters().items()
    }
    train(first, "t5")
    assert torch.equal(logits(one, "t5"), logits(other.eval(), "t5"))
    assert generate(one, "t5") == generate(other, "t5")
    both = HybridAttachment(
        other, map_model(other), hybrid.Settings(rank=2), head="seq2seq", seed=0, existing=second
    )
    both.model.eval()
    assert torch.equal(logits(both.model, "t5"), logits(one, "t5")), (
        "LoRA starts from what the layer has learnt"
    )
    assert both.counts["new_layer"] == sum(p.numel() for p in first.parameters().values())
    train(both, "t5")
    assert same(second.layers.state(), first.layers.state()), "trained on one base, it shows on the other"
    assert both.remove() is other
    assert torch.equal(logits(other, "t5"), logits(build("t5"), "t5"))
    deeper = build("t5", 4)
    with pytest.raises(MethodError, match=r"cannot be shared: encoder\.block\.4"):
        share_layers(deeper, map_model(deeper), attach(build("t5"), "t5"), head="seq2seq", seed=0)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_a_new_head_is_trained_as_a_copy_and_goes_with_the_adapter(name):
    base = build(name)
    original = base.classifier
    attached = attach(base, name)
    assert "classifier" in {n.split(".")[0] for n in attached.parameters()}
    assert train(attached, name) is not None
    assert base.classifier is not original
    with attached.disabled():
        assert base.classifier is original
        assert torch.equal(logits(base, name), logits(build(name), name))
    existing = HybridAttachment(
        base, attached.family, hybrid.Settings(rank=2), head="classification", seed=0, existing=attached
    )
    assert train(existing, name) is not None
    with existing.disabled():
        assert torch.equal(logits(existing.model, name), logits(build(name), name))
    assert existing.remove() is base
    assert base.classifier is original
    assert torch.equal(logits(base, name), logits(build(name), name))


# -- companions: the checks above notice a broken product --------------------------------------------------------


def test_companion_a_gate_that_is_forgotten_is_noticed(monkeypatch):
    monkeypatch.setattr(new_layers, "add_gate", lambda *_: None)
    assert not torch.equal(logits(attach(build("bert"), "bert").model, "bert"), logits(build("bert"), "bert"))


def test_companion_zeros_everywhere_would_not_train(monkeypatch):
    """The identity by zeros in all of a block is dead: law 1 says so."""
    real = new_layers.scale_outputs
    monkeypatch.setattr(
        new_layers, "scale_outputs", lambda block, outputs, f: real(block, [n for n, _ in block.named_children()], f)
    )  # fmt: skip
    with pytest.raises(Exception, match="its gradient was zero"):
        train(attach(build("llama"), "llama"), "llama")
