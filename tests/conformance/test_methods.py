"""What every method must keep, on every kind of model; a new file in `methods/` enters by itself."""

import json
import warnings

import peft
import pytest
import torch
from torch import nn

import tiny_models
from peftlab.attaching import attachment as attachment_module
from peftlab.catalog import METHODS
from peftlab.errors import CheckpointError
from peftlab.gradients import read_gradients
from peftlab.mapping import map_model
from peftlab.proof import TrainingProof, fingerprint

PROMPTS = {"prompt_tuning", "p_tuning", "prefix_tuning"}
"""Methods that change what a model reads: no identity at the start, no targets."""
OWN_FILES = {"full", "bitfit", "new_layer", "hybrid"}
"""Methods that plain peft has not: their files are their own, and their tests load them."""
NOT_RANDOM = {"ia3", "full", "bitfit", "new_layer"}
"""Methods that start from one and the same value."""

CASES = [
    pytest.param(method, name, id=f"{method}-{name}")
    for method in METHODS.names()
    for name in tiny_models.MAIN
    if (method, name) != ("bitfit", "t5")  # without biases: refused
]
TIED = [
    pytest.param(method, name, id=f"{method}-{name}")
    for method in METHODS.names()
    if method not in PROMPTS | {"bitfit", "new_layer"}
    for name in ("llama_tied", "gpt2", "t5")
]


def attach(method, name, *, targets=None, seed=3):
    """A method on a fresh tiny model; `targets` where the method has any."""
    leaf = METHODS.load(method)
    settings = {"targets": targets} if targets and "targets" in leaf.Settings.model_fields else {}
    base = tiny_models.build(name)
    attached = leaf.attach(
        base, map_model(base), leaf.Settings(**settings), head=tiny_models.HEADS[name], seed=seed
    )
    attached.model.eval()
    return base, attached


@torch.no_grad()
def logits(model, name):
    return model(**tiny_models.inputs(name)).logits


def train(attached, name, *, optimizer=torch.optim.AdamW):
    """As many optimizer steps in training mode as law 1 allows, two at least; its proof looks on and is returned."""
    parameters = attached.parameters()
    steps = max(2, *(attached.steps_to_train(name) for name in parameters))
    moving = optimizer(parameters.values(), lr=1e-2)
    proof = TrainingProof(parameters, attached.steps_to_train)
    proof.enter("all")
    attached.model.train()
    shown = None
    for step in range(steps):
        torch.manual_seed(step)
        moving.zero_grad(set_to_none=True)
        attached.model(**tiny_models.training_inputs(name, seed=step)).loss.backward()
        proof.observe(read_gradients(parameters), step=step)
        moving.step()
        shown = proof.after_step(learning_rate=1e-2, step=step) or shown
    attached.model.eval()
    return shown


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case.values[0] not in PROMPTS])
def test_a_fresh_adapter_has_no_effect(method, name):
    expected = logits(tiny_models.build(name), name)
    _, attached = attach(method, name)
    torch.testing.assert_close(logits(attached.model, name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("targets", ["both", "all"])
def test_law_1_everything_trains_within_its_steps(method, name, targets):
    _, attached = attach(method, name, targets=targets)
    parameters = attached.parameters()
    shown = train(attached, name)
    assert shown is not None
    assert shown.tensors == len(parameters)
    assert shown.unreached == ()
    trainable = {n for n, p in attached.model.named_parameters() if p.requires_grad}
    assert trainable == set(parameters), "nothing else trains"


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("targets", ["both", "all"])
def test_law_2_the_base_comes_back(method, name, targets):
    reference = tiny_models.build(name)
    base, attached = attach(method, name, targets=targets)
    required = {n: p.requires_grad for n, p in reference.named_parameters()}
    trained = train(attached, name)
    assert trained is not None
    assert not torch.equal(logits(attached.model, name), logits(reference, name)), "it has learnt something"
    returned = attached.remove()
    assert returned is base
    before, after = reference.state_dict(), base.state_dict()
    assert list(after) == list(before)
    changed = [n for n in before if fingerprint(before[n]) != fingerprint(after[n])]
    assert changed == [n for n in before if n in attached.rewritten]
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == required
    assert [type(m) for m in base.modules()] == [type(m) for m in reference.modules()]
    assert torch.equal(logits(base, name), logits(reference, name))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_base_answers_while_the_adapter_is_disabled(method, name):
    _, attached = attach(method, name, targets="all")
    expected = logits(tiny_models.build(name), name)
    train(attached, name)
    with_adapter = logits(attached.model, name)
    first = next(iter(attached.parameters().values()))
    first.requires_grad_(False)  # as a phase would
    states = {n: p.requires_grad for n, p in attached.model.named_parameters()}
    with attached.disabled():
        torch.testing.assert_close(logits(attached.model, name), expected, rtol=0, atol=1e-6)
    assert torch.equal(logits(attached.model, name), with_adapter)
    assert {n: p.requires_grad for n, p in attached.model.named_parameters()} == states


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case.values[0] not in OWN_FILES])
@pytest.mark.parametrize("targets", ["both", "all"])
def test_plain_peft_loads_what_is_saved(method, name, targets, tmp_path):
    _, attached = attach(method, name, targets=targets)
    train(attached, name)
    attached.save(tmp_path)
    beside = ["prompt_encoder.safetensors"] if method in PROMPTS else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        *beside,
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    with warnings.catch_warnings():
        if (
            targets == "all"
        ):  # what peft cannot tie by itself (T5's four modules; IA3) is tied by the attachment
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        loaded = peft.PeftModel.from_pretrained(tiny_models.build(name), str(tmp_path)).eval()
    if (method, name) == ("prefix_tuning", "t5"):
        return  # peft 0.21 gives half of an encoder-decoder's layers the prefix of another
    torch.testing.assert_close(
        logits(loaded, name), logits(attached.model, name), rtol=0, atol=0, msg="the saved adapter"
    )
    if method in PROMPTS and name == "bert":
        return  # peft 0.21 cannot switch a prompt off on a model that does not generate
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, name), logits(tiny_models.build(name), name)), "the loader's base"


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("targets", ["both", "all"])
def test_tensors_go_round(method, name, targets):
    _, attached = attach(method, name, targets=targets)
    fresh = attached.tensors()
    start = logits(attached.model, name)
    train(attached, name)
    trained, answers = attached.tensors(), logits(attached.model, name)
    assert not all(torch.equal(fresh[n], trained[n]) for n in fresh), "tensors() is a copy"
    attached.load(fresh)
    assert torch.equal(logits(attached.model, name), start)
    _, other = attach(method, name, targets=targets, seed=99)
    states = {n: p.requires_grad for n, p in other.model.named_parameters()}
    other.load(trained)
    assert torch.equal(logits(other.model, name), answers)
    assert {n: p.requires_grad for n, p in other.model.named_parameters()} == states
    again = other.tensors()
    assert list(again) == list(trained)
    assert all(torch.equal(again[n], trained[n]) for n in trained)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_loading_is_strict(method, name):
    _, attached = attach(method, name)
    tensors = attached.tensors()
    key = sorted(tensors)[0]
    before = {n: p.detach().clone() for n, p in attached.parameters().items()}
    bad = {
        f"missing \\['{key}'": {n: t for n, t in tensors.items() if n != key},
        "unexpected \\['nobody'\\]": tensors | {"nobody": torch.zeros(1)},
        f"another shape \\['{key}'": tensors | {key: torch.cat([tensors[key]] * 2)},
    }
    for message, given in bad.items():
        with pytest.raises(CheckpointError, match=message):
            attached.load(given)
    assert all(torch.equal(before[n], p) for n, p in attached.parameters().items()), "untouched by a refusal"


@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_seed_decides_the_start_and_nothing_else_does(method, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = attach(method, name, seed=1)[1].tensors()
    torch.manual_seed(6)
    same = attach(method, name, seed=1)[1].tensors()
    other = attach(method, name, seed=2)[1].tensors()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert method in NOT_RANDOM or not all(torch.equal(one[n], other[n]) for n in one)
    torch.manual_seed(5)
    base = tiny_models.build(name)
    after_build = torch.get_rng_state()
    leaf = METHODS.load(method)
    leaf.attach(base, map_model(base), leaf.Settings(), head=tiny_models.HEADS[name], seed=1)
    assert torch.equal(torch.get_rng_state(), after_build), "the caller's random stream is left alone"
    assert before.shape == after_build.shape


@pytest.mark.parametrize(("method", "name"), TIED)
def test_a_tied_pair_is_one_tensor_that_stays_tied(method, name):
    base, attached = attach(method, name, targets="all")
    original = base.get_input_embeddings()
    embedding = getattr(original, "modules_to_save", {"default": original})["default"].weight
    whole = [n for n, p in attached.parameters().items() if p is embedding]
    assert len(whole) == 1, "counted once"
    assert len(attached.selection.saved) == 1
    train(attached, name)
    users = used_weights(base)
    assert len({id(w) for w in users}) == 1, "embedding and head still share their weight"
    assert users[0] is attached.parameters()[whole[0]]
    assert any(torch.equal(t, users[0]) for t in attached.tensors().values() if t.shape == users[0].shape)
    before = logits(attached.model, name)
    with torch.no_grad():
        attached.parameters()[whole[0]].mul_(1.5)
    assert not torch.equal(before, logits(attached.model, name))
    attached.remove()
    reference = tiny_models.build(name)
    assert torch.equal(base.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def used_weights(base):
    """The weights that embedding lookups and the head really use in a forward pass."""
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    modules += [
        m for n, m in base.named_modules() if n.endswith(("encoder.embed_tokens", "decoder.embed_tokens"))
    ]
    return [getattr(m, "modules_to_save", {"default": m})["default"].weight for m in modules]


# -- companions: the checks above notice a broken product --------------------------------------------------------


def test_companion_an_untied_copy_is_noticed():
    base, attached = attach("lora", "llama_tied", targets="all")
    head = base.get_output_embeddings().modules_to_save["default"]
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert len({id(w) for w in used_weights(base)}) == 2
    assert attached.parameters() is not None


def test_companion_a_base_that_moved_is_noticed(monkeypatch):
    monkeypatch.setattr(attachment_module, "_restore_originals", lambda model: None)
    base, attached = attach("lora", "llama", targets="all")
    train(attached, "llama")
    attached.remove()
    reference = tiny_models.build("llama").state_dict()
    after = base.state_dict()
    assert list(after) != list(reference) or any(not torch.equal(after[n], reference[n]) for n in reference)


def test_companion_one_bit_of_a_base_tensor_is_noticed():
    weight = tiny_models.build("llama").lm_head.weight.detach()
    moved = weight.clone()
    moved[3, 5] = torch.nextafter(moved[3, 5], torch.tensor(9.0))
    assert fingerprint(weight) != fingerprint(moved)


def test_companion_an_adapter_that_is_not_zero_is_noticed():
    expected = logits(tiny_models.build("llama"), "llama")
    _, attached = attach("lora", "llama")
    with torch.no_grad():
        for name, parameter in attached.parameters().items():
            if ".lora_B." in name:
                parameter.add_(0.01)
    assert (logits(attached.model, "llama") - expected).abs().max() > 1e-4
