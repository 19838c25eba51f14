"""Gradient norms: equal to autograd's truth, per tensor, group and layer, in one transfer."""

import math

import pytest
import torch
from torch import nn

import tiny_models
from peftlab import gradients
from peftlab.gradients import GradientGroups, Reading, measure_gradient_norms, read_gradients
from peftlab.mapping import map_model
from peftlab.methods import lora
from peftlab.schedule import GROUPS

NAMES = ("llama", "llama_tied", "gpt2", "bert", "t5")


def attach(name, *, targets="both", dtype=torch.float64):
    """LoRA on a tiny model, with B moved off zero so that A has a gradient."""
    base = tiny_models.build(name).to(dtype)
    attached = lora.attach(
        base, map_model(base), lora.Settings(targets=targets, dropout=0), head=tiny_models.HEADS[name], seed=0
    )
    attached.model.to(dtype)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source).to(dtype))
    return attached


def backward(attached, name, seed=0, scale=1.0):
    (attached.model(**tiny_models.training_inputs(name, seed=seed)).loss * scale).backward()


def truth(attached, name):
    """Squared norms from autograd itself, summed over the parts that names give away in these models."""
    parameters = attached.parameters()
    loss = attached.model(**tiny_models.training_inputs(name)).loss
    found = torch.autograd.grad(loss, list(parameters.values()))
    squares = {}
    for parameter_name, gradient in zip(parameters, found, strict=True):
        group = group_of(parameter_name)
        squares[group] = squares.get(group, 0.0) + float(gradient.double().pow(2).sum())
    return squares


def group_of(name):
    """The layer and group of a tensor by its name: an independent reading of these five architectures."""
    words = name.split(".")
    if any(w in words for w in ("embed_tokens", "wte", "word_embeddings", "shared")):
        return None, "embed"
    if "lm_head" in words or "classifier" in words:
        return None, "lm_head"
    layer = next(int(w) for w in words if w.isdigit())
    stack = next((w for w in words if w in ("encoder", "decoder")), "") if "block" in words else ""
    marks = ("self_attn", "attn", "attention", "SelfAttention", "EncDecAttention")
    group = "attention" if any(mark in words for mark in marks) else "mlp"
    return f"{stack}_layer_{layer}".lstrip("_"), group


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", ["both", "all"])
def test_norms_equal_autograd(name, targets):
    attached = attach(name, targets=targets)
    squares = truth(attached, name)
    backward(attached, name)
    found = measure_gradient_norms(attached.model)
    for group in GROUPS:
        expected = [value for (_, g), value in squares.items() if g == group]
        norm = found[f"{group}_norm"]
        assert (norm is None) == (not expected), group
        if expected:
            assert norm == pytest.approx(math.sqrt(sum(expected)), rel=1e-12)
    layers = {f"{layer}_{group}": math.sqrt(v) for (layer, group), v in squares.items() if layer}
    assert found["layer_data"] == pytest.approx(layers, rel=1e-12)
    assert found["total_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_total_squared_is_the_sum_of_squares(name):
    attached = attach(name, targets="all")
    backward(attached, name)
    found = measure_gradient_norms(attached.model)
    parts = [found[f"{group}_norm"] for group in GROUPS if found[f"{group}_norm"] is not None]
    assert found["total_norm"] ** 2 == pytest.approx(sum(p * p for p in parts), rel=1e-12)
    for group in ("attention", "mlp"):
        layers = [v for c, v in found["layer_data"].items() if c.endswith(group)]
        assert found[f"{group}_norm"] ** 2 == pytest.approx(sum(v * v for v in layers), rel=1e-12)
    parameters = attached.parameters()
    assert found["num_parameters"]["total"] == sum(p.numel() for p in parameters.values())


def test_the_check_notices_one_per_cent():
    attached = attach("llama")
    squares = truth(attached, "llama")
    backward(attached, "llama")
    next(iter(attached.parameters().values())).grad.mul_(1.01)
    found = measure_gradient_norms(attached.model)["total_norm"]
    assert found != pytest.approx(math.sqrt(sum(squares.values())), rel=1e-6)


def test_groups_without_a_gradient_are_none():
    attached = attach("llama")
    groups = GradientGroups(attached.family, attached.parameters())
    for name, parameter in attached.parameters().items():
        parameter.requires_grad_(".mlp." in name and ".layers.1." in name)
    backward(attached, "llama")
    found = groups.sum(read_gradients(attached.parameters()))
    assert found["attention_norm"] is None
    assert found["embed_norm"] is found["lm_head_norm"] is found["other_norm"] is None
    assert found["mlp_norm"] == found["total_norm"] > 0
    assert {c: v is None for c, v in found["layer_data"].items()} == {
        "layer_0_attention": True, "layer_0_mlp": True, "layer_1_attention": True, "layer_1_mlp": False,
    }  # fmt: skip
    assert found["num_parameters"]["attention"] == 0


def test_no_gradient_at_all_is_none_and_zero_is_zero():
    parameters = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    assert read_gradients(parameters).norms == {}
    parameters["b"].grad = torch.zeros(2)
    reading = read_gradients(parameters)
    assert reading.norms == {"b": 0.0}
    assert reading.zero() == ["b"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_through(bad):
    attached = attach("llama")
    backward(attached, "llama")
    name = next(n for n in attached.parameters() if ".mlp." in n)
    attached.parameters()[name].grad[0, 0] = bad
    reading = read_gradients(attached.parameters())
    assert reading.not_finite() == [name]
    found = GradientGroups(attached.family, attached.parameters()).sum(reading)
    assert not math.isfinite(found["mlp_norm"])
    assert not math.isfinite(found["total_norm"])
    assert math.isfinite(found["attention_norm"])


def test_an_accumulated_step_has_the_gradient_of_the_whole_batch():
    whole, parts = attach("llama"), attach("llama")
    made = tiny_models.training_inputs("llama", batch=4)
    whole.model(**made).loss.backward()
    for half in (slice(0, 2), slice(2, 4)):
        (parts.model(**{k: v[half] for k, v in made.items()}).loss / 2).backward()
    one, two = read_gradients(whole.parameters()).norms, read_gradients(parts.parameters()).norms
    assert two == pytest.approx(one, rel=1e-10)


def test_a_loss_scale_is_divided_out():
    plain, scaled = attach("llama"), attach("llama")
    backward(plain, "llama")
    backward(scaled, "llama", scale=1024.0)
    one = read_gradients(plain.parameters()).norms
    assert read_gradients(scaled.parameters(), scale=1024.0).norms == pytest.approx(one, rel=1e-12)
    assert read_gradients(scaled.parameters()).norms != pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    parameter = nn.Parameter(torch.zeros(4096, dtype=dtype))
    parameter.grad = torch.full((4096,), 300.0, dtype=dtype)
    assert read_gradients({"p": parameter}).norms["p"] == pytest.approx(300.0 * 64, rel=1e-3)


def test_reading_changes_no_gradient():
    attached = attach("llama")
    backward(attached, "llama")
    before = {n: p.grad.clone() for n, p in attached.parameters().items()}
    versions = {n: p.grad._version for n, p in attached.parameters().items()}
    measure_gradient_norms(attached.model)
    assert all(torch.equal(before[n], p.grad) for n, p in attached.parameters().items())
    assert {n: p.grad._version for n, p in attached.parameters().items()} == versions


@pytest.fixture
def transfers(monkeypatch):
    """Counts every way by which a tensor's values reach the host."""
    seen = []
    for method in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, method)

        def counted(self, *args, _original=original, _method=method, **kwargs):
            seen.append(_method)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, counted)
    return seen


def test_one_transfer_per_reading(transfers):
    attached = attach("llama")
    backward(attached, "llama")
    groups = GradientGroups(attached.family, attached.parameters())
    transfers.clear()
    groups.sum(read_gradients(attached.parameters()))
    assert transfers == ["tolist"]


def test_the_count_notices_a_transfer_per_tensor(transfers):
    attached = attach("llama")
    backward(attached, "llama")
    transfers.clear()
    for parameter in attached.parameters().values():
        parameter.grad.norm().item()
    assert len(transfers) == len(attached.parameters())


def test_one_reduction_per_reading(monkeypatch):
    attached = attach("llama")
    backward(attached, "llama")
    calls = []
    original = torch._foreach_norm
    monkeypatch.setattr(
        gradients.torch, "_foreach_norm", lambda tensors: calls.append(len(tensors)) or original(tensors)
    )
    read_gradients(attached.parameters())
    assert calls == [len(attached.parameters())]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    plain, checkpointed = attach(name), attach(name)
    model = checkpointed.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # renamed in transformers 5.23
    forwards = []
    for attached in (plain, checkpointed):
        attached.model.train()
        first = next(site.path for site in attached.family.sites if site.layer == 0 and site.linear)
        attached.model.get_submodule(first).register_forward_hook(lambda *_, a=attached: forwards.append(a))
        made = tiny_models.training_inputs(name)
        attached.model(**made, use_cache=False).loss.backward()
    assert (forwards.count(plain), forwards.count(checkpointed)) == (1, 2), "it was computed a second time"
    for parameter_name, parameter in plain.parameters().items():
        other = checkpointed.parameters()[parameter_name]
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-11, atol=1e-14, msg=parameter_name)
    one, two = measure_gradient_norms(plain.model), measure_gradient_norms(checkpointed.model)
    assert one["total_norm"] == pytest.approx(two["total_norm"], rel=1e-12)


def test_a_tied_tensor_counts_once():
    attached = attach("llama_tied", targets="all")
    backward(attached, "llama_tied")
    found = measure_gradient_norms(attached.model)
    assert found["num_parameters"]["embed"] == tiny_models.VOCABULARY * tiny_models.HIDDEN
    assert found["lm_head_norm"] is None


def test_a_bare_model_is_measured_too():
    model = tiny_models.build("gpt2")
    model(**tiny_models.training_inputs("gpt2")).loss.backward()
    found = measure_gradient_norms(model)
    expected = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
    assert found["total_norm"] == pytest.approx(expected, rel=1e-5)
    assert found["other_norm"] > 0, "norms and biases count to other or their part"


def test_a_reading_knows_what_is_bad():
    reading = Reading({"a": 1.0, "b": 0.0, "c": math.nan, "d": math.inf})
    assert reading.zero() == ["b"]
    assert reading.not_finite() == ["c", "d"]
