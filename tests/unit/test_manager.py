"""The efficient fine-tuning manager's LoRA and AdaLoRA: the papers' formulas in float64, on modules in use, and off again.

Parity is shown with the formulas written out over the untouched base; each such test is also run with the product made
wrong by one percent, and must fail then.
"""

import copy

import pytest
import torch
from encoder_models import agree_and_learn_alike, awaken, encoder, ids, train
from torch import nn
from torch.func import functional_call

import peftlab
import tiny_models
from peftlab.efficient import adapted
from peftlab.efficient.layers import AttentionLoRA
from peftlab.efficient.weights import adapter_tensors
from peftlab.errors import (
    ConfigError,
    MethodError,
    NonFiniteError,
    NotTrainingError,
    TargetError,
    UnknownNameError,
)
from peftlab.manager import EfficientFineTuningManager, LoRALayer, LoRALinear
from peftlab.proof import fingerprint

BOTH = ["self_attn.out_proj", "linear2"]
ALPHA, RANK = 6.0, 3
NO_DROPOUT = {"rank": RANK, "alpha": ALPHA, "dropout_probability": 0.0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lora(layer, a, b, c=None):
    """W0 + alpha / r B A, and b0 + alpha / r c."""
    scale = ALPHA / RANK
    return layer.weight + scale * b @ a, layer.bias if c is None else layer.bias + scale * c


def adalora(layer, q, p, values):
    """W0 + alpha / (r + 1e-5) P Lambda Q."""
    return layer.weight + ALPHA / (RANK + 1e-5) * p @ torch.diag(values.flatten()) @ q, layer.bias


CASES = {
    "lora": ("apply_lora", {}, lora, ("lora_A.weight", "lora_B.weight")),
    "lora_bias": ("apply_lora", {"bias": True}, lora, ("lora_A.weight", "lora_B.weight", "lora_B.bias")),
    "adalora": ("apply_adalora", {}, adalora, ("lora_A", "lora_B", "lora_E")),
}


@pytest.mark.parametrize("percent", [0, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_papers_formula(case, training, percent):
    """Forward, gradients and three optimizer steps, on a layer that is called and one that is only read."""
    call, settings, formula, names = CASES[case]
    model = encoder()
    base = copy.deepcopy(model).requires_grad_(False).train(training)
    manager = EfficientFineTuningManager(model)
    getattr(manager, call)(BOTH, **NO_DROPOUT, **settings)
    model.train(training)
    awaken(manager)
    own = adapter_tensors(model)
    by_hand = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    assert len(own) == 2 * len(names)

    def reference():
        exchanged = {}
        for path in (f"transformer.{target}" for target in BOTH):
            parts = [by_hand[f"{path}.{name}"] for name in names]
            weight, bias = formula(base.get_submodule(path), *parts)
            exchanged |= {f"{path}.weight": weight, f"{path}.bias": bias}
        return functional_call(base, exchanged, (ids(),))

    pairs = [(own[name], by_hand[name]) for name in own]
    if not percent:
        agree_and_learn_alike(lambda: model(ids()), reference, pairs)
        return
    for layer in (manager.lora_layers | manager.adalora_layers).values():
        layer.scaling["default"] *= 1.01
    with pytest.raises(AssertionError, match="not close"):
        agree_and_learn_alike(lambda: model(ids()), reference, pairs)


def test_a_fresh_adapter_has_no_effect_to_the_last_bit(monkeypatch):
    model = encoder(dtype=torch.float32).requires_grad_(False)
    monkeypatch.setattr(
        torch.backends.mha, "get_fastpath_enabled", lambda: False
    )  # other kernels, other last bits
    expected = model(ids())
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(["linear1", "output"], dropout_probability=0.5)
    manager.apply_adalora(BOTH, dropout_probability=0.0)
    assert torch.equal(model(ids()), expected), "and the new layers are in the mode of those they stand for"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.{part}"
        for path in ("transformer.linear1", "output")
        for part in ("lora_A.default.weight", "lora_B.default.weight")
    } | {f"transformer.{path}.lora_{part}.default" for path in BOTH for part in "ABE"}


@pytest.mark.parametrize("call", ["apply_lora", "apply_adalora"])
@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_evaluation_does_not_read_past_an_adapter(call, target, stacked, monkeypatch):
    """torch's fused encoder layer reads base weights; with it on, the same test fails."""
    padding = torch.tensor([[False] * 6, [False] * 6, [False] * 4 + [True] * 2])
    masks = {"src_key_padding_mask": padding} if stacked else {}

    def answers():
        model = encoder(stacked=stacked, dtype=torch.float32)
        with torch.no_grad():
            fused = model(ids(), **masks)
        manager = EfficientFineTuningManager(model)
        getattr(manager, call)([target], dropout_probability=0.0)
        awaken(manager)
        with torch.no_grad():
            evaluated = model(ids(), **masks)
        trained = model.train()(ids(), **masks).detach()
        model.eval()
        manager.merge()
        with torch.no_grad():
            return fused, evaluated, trained, model(ids(), **masks)

    fused, evaluated, trained, merged = answers()
    seen = slice(None, 4)  # nested tensors have zeros where the padding is
    assert not torch.allclose(evaluated[:, seen], fused[:, seen], atol=1e-2)
    torch.testing.assert_close(evaluated[:, seen], trained[:, seen], rtol=0, atol=1e-5)
    torch.testing.assert_close(evaluated[:, seen], merged[:, seen], rtol=0, atol=1e-5)
    monkeypatch.setattr(adapted, "leave_shortcuts", lambda *_: [])
    if target == "linear2":
        fused, evaluated, *_ = answers()
        assert torch.equal(evaluated, fused), (
            "the shortcut is real: unless it is left, nothing of the adapter is seen"
        )


def test_a_layer_that_is_only_read_would_train_nothing_if_it_were_called(monkeypatch):
    model = encoder()
    manager = peftlab.apply_lora_to_model(model, ["out_proj"], dropout_probability=0.0)
    assert isinstance(manager.lora_layers["transformer.self_attn.out_proj"], AttentionLoRA)
    monkeypatch.setattr(adapted, "is_read_by_attention", lambda *_: False)
    naive = encoder()
    awaken(peftlab.apply_lora_to_model(naive, ["out_proj"], dropout_probability=0.0))
    assert not naive.train()(ids()).requires_grad


def test_gradients_are_shown_to_reach_what_trains():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.called(x) @ self.read.weight.T

    model = Reading()
    manager = peftlab.apply_lora_to_model(model, ["called"])
    model(torch.randn(2, 4)).sum().backward()
    manager.check_gradients()
    manager.lora_layers["called"].lora_B["default"].weight.grad[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"called\.lora_B"):
        manager.check_gradients()
    model.read.weight.grad = torch.ones(4, 4)
    with pytest.raises(NotTrainingError, match=r"reaches \[\], and gradients are on \['read\.weight'\]"):
        manager.check_gradients()
    manager.remove().zero_grad()
    manager.apply_lora(["read"])
    with pytest.raises(
        NotTrainingError, match=r"no gradient reaches \['read\.lora_A\.weight', 'read\.lora_B\.weight'\]"
    ):
        manager.check_gradients()


def test_dropout_where_it_has_no_place_is_said_aloud():
    with pytest.warns(UserWarning, match=r"no adapter dropout on transformer\.self_attn\.out_proj"):
        manager = peftlab.apply_lora_to_model(encoder(), BOTH, dropout_probability=0.5)
    layer = manager.lora_layers["transformer.linear2"]
    nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.ones(1, 24, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)
    layer.train()
    assert not torch.allclose(layer(x), layer(x))


def test_targets_are_names_or_ends_of_names():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("linear2", "linear20", "in_linear2", "head")})
    model["deep"] = nn.ModuleDict({"linear2": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    manager = peftlab.apply_lora_to_model(model, ["linear2", "deep.linear2"], rank=1)
    assert list(manager.lora_layers) == ["linear2", "deep.linear2"]
    for wrong, told in (
        (["linaer2"], "'linaer2' .did you mean 'linear20'"),
        (["near2"], "nothing here is called 'near2'"),
        (["head", "tail"], "'tail'"),
        (["deep"], "'deep' is no linear layer but a ModuleDict"),
        (["norm"], r"'deep\.norm' is no linear layer but a LayerNorm$"),
        ([], "name at least one"),
        ([""], "nothing here"),
    ):
        with pytest.raises(TargetError, match=told):
            EfficientFineTuningManager(model).apply_lora(wrong)
    with pytest.raises(TargetError, match=r"linear layers in it: transformer\.self_attn\.out_proj, transf"):
        peftlab.apply_lora_to_model(encoder(), "transformer")
    with pytest.raises(MethodError, match=r"'transformer\.self_attn\.out_proj'"):
        peftlab.apply_lora_to_model(encoder(), ["self_attn"])


def test_applying_twice_is_refused():
    model = encoder()
    manager = peftlab.apply_lora_to_model(model, ["linear2"])
    with pytest.raises(MethodError, match=r"apply_lora has been called .* remove\(\)"):
        manager.apply_lora(["linear1"])
    with pytest.raises(MethodError, match=r"'transformer\.linear2' is adapted already"):
        manager.apply_adalora(["linear2"])
    with pytest.raises(MethodError, match="adapted already"):
        peftlab.apply_lora_to_model(model, ["linear2"])
    manager.apply_adalora(["linear1"])
    manager.remove()
    manager.apply_lora(["linear2"])
    assert list(manager.lora_layers) == ["transformer.linear2"]


@pytest.mark.parametrize("call", ["apply_lora", "apply_adalora"])
def test_the_base_comes_back_bit_by_bit(call):
    model = encoder(2, dtype=torch.float32)
    model.embedding.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    before = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = model(ids()).detach()
    manager = EfficientFineTuningManager(model)
    getattr(manager, call)(BOTH, dropout_probability=0.0)
    train(model, manager.get_trainable_parameters())
    assert not torch.allclose(model(ids()), expected, atol=1e-3)
    assert manager.remove() is model
    assert {name: fingerprint(tensor) for name, tensor in model.state_dict().items()} == before
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules.values())
    assert model.transformer.use_nested_tensor
    assert torch.equal(model(ids()), expected)
    assert manager.count_trainable_parameters() == 0


@pytest.mark.parametrize(("call", "settings"), [("apply_lora", {"bias": True}), ("apply_adalora", {})])
def test_merged_is_as_unmerged(call, settings):
    model = encoder(2)
    keys = list(model.state_dict())
    manager = EfficientFineTuningManager(model)
    getattr(manager, call)([*BOTH, "output"], dropout_probability=0.0, **settings)
    awaken(manager)
    expected = model(ids()).detach()
    assert manager.merge() is model
    torch.testing.assert_close(model(ids()), expected, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == keys
    with pytest.raises(MethodError, match="nothing to merge"):
        manager.merge()


def test_what_cannot_be_merged_is_refused_before_anything_is():
    model = tiny_models.build("llama_tied")
    manager = awaken(peftlab.apply_lora_to_model(model, ["q_proj", "lm_head"]))
    before = model(**tiny_models.inputs("llama_tied")).logits
    with pytest.raises(MethodError, match=r"'lm_head' is used elsewhere too \(model\.embed_tokens"):
        manager.merge()
    assert torch.equal(model(**tiny_models.inputs("llama_tied")).logits, before)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    with pytest.warns(UserWarning, match="has no bias"):
        manager = peftlab.apply_lora_to_model(plain, ["0", "1"], bias=True)
    with pytest.raises(MethodError, match="'1' has no bias"):
        manager.merge()
    manager.remove()
    manager.apply_lora(["0"])
    nn.init.constant_(manager.lora_layers["0"].lora_B["default"].weight, float("nan"))
    with pytest.raises(NonFiniteError, match="'0' is not finite"):
        manager.merge()
    assert plain[0].base_layer.weight.isfinite().all()


def test_bad_values_name_the_argument_and_leave_the_model_alone():
    model = encoder()
    modules = dict(model.named_modules())
    for settings, told in (
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"alpha": 0}, "alpha must be"),
        ({"dropout_probability": 1.0}, "dropout_probability must be"),
    ):
        for call in ("apply_lora", "apply_adalora"):
            with pytest.raises(ConfigError, match=told):
                getattr(EfficientFineTuningManager(model), call)(["linear2"], **settings)
    with pytest.raises(MethodError, match="AdaLoRA has no bias"):
        EfficientFineTuningManager(model).apply_adalora(["linear2"], bias=True)
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        EfficientFineTuningManager(model).apply_adalora(["linear2"], rank_allocation="uniforn")
    with pytest.raises(ConfigError, match="input_dimension must be"):
        LoRALayer(0, 4)
    with pytest.raises(MethodError, match="not Conv2d"):
        LoRALinear(nn.Conv2d(1, 1, 1))
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    half[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MethodError, match="is quantised"):
        peftlab.apply_lora_to_model(half, ["0", "1"])
    assert half[0].weight.requires_grad, "what was frozen for the first layer trains again"
    assert type(half[0]) is nn.Linear
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
