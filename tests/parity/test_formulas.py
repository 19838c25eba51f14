"""Each method against the formula of its paper, written out here, and against peft used by hand; float64.

A formula stands in a bare model in the place of a layer, or feeds it, with leaf tensors of the adapter's values: logits,
loss and gradients must agree. Three AdamW steps must then give the tensors that peft's own objects, driven by hand, come to.
Where peft departs from a paper, the formula here is peft's and says so.
"""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_models
from peftlab.catalog import METHODS
from peftlab.mapping import map_model
from peftlab.schedule import Schedule, place_phases

EXACT = {"rtol": 1e-10, "atol": 1e-12}
RATE, STEPS, VIRTUAL = 1e-2, 3, 4
BASE = "opt"
"""Layer norms in float64 (a Llama's compute in float32), linear layers with biases, no dropout."""


def cross_entropy(logits, labels, **_):
    """Next-token cross-entropy, the mean over labelled tokens, in the logits' own dtype."""
    chosen = labels[:, 1:]
    shares = functional.log_softmax(logits[:, :-1], dim=-1)
    kept = chosen != -100
    return -shares[kept].gather(1, chosen[kept].unsqueeze(1)).mean()


def base(name=BASE):
    """A bare model whose loss is in float64 too: transformers' own computes in float32."""
    model = tiny_models.build(name).double()
    model.loss_function = cross_entropy
    return model


def attach(method, name=BASE, **settings):
    """A method on a tiny base, its tensors moved off their start."""
    leaf, model = METHODS.load(method), base(name)
    attached = leaf.attach(model, map_model(model), leaf.Settings(**settings), head="causal", seed=3)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    attached.model.eval()
    return attached


def batch(seed=0):
    made = tiny_models.training_inputs(BASE, seed=seed)
    made["labels"][:, :2] = -100
    return made


def leaves(attached):
    """The adapter's values as leaf tensors of their own, by name in the bare model."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): p.detach().clone().requires_grad_()
        for name, p in attached.parameters().items()
    }


class Formula(nn.Module):
    """A layer of the bare model with a formula around it."""

    def __init__(self, layer, compute):
        super().__init__()
        self.layer, self.compute = layer, compute

    def forward(self, x):
        return self.compute(self.layer, x)


def with_formula(model, values, suffix, compute):
    """Put a formula where the adapter has a tensor of a kind; `compute(W0, x, path)`."""
    for name in [n for n in values if n.endswith(suffix)]:
        path = name[: -len(suffix)]
        parent, _, last = path.rpartition(".")
        layer = model.get_submodule(path)
        setattr(
            model.get_submodule(parent), last, Formula(layer, lambda w, x, path=path: compute(w, x, path))
        )
    return model


def compare(attached, expected_logits, expected_loss, values):
    """Logits, loss and gradients of the adapted model are the formula's."""
    assert expected_loss.dtype == torch.float64
    output = attached.model(**batch(), use_cache=False)
    torch.testing.assert_close(output.logits, expected_logits, **EXACT)
    torch.testing.assert_close(output.loss, expected_loss, **EXACT)
    output.loss.backward()
    expected_loss.backward()
    found = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in attached.parameters().items()
    }
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert value.grad is not None
        assert value.grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], value.grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_lora():
    """h = W0 x + (alpha / r) B A x; Hu et al. 2021, section 4.1."""
    attached = attach("lora", rank=4, alpha=6, dropout=0.0)
    values = leaves(attached)

    def formula(layer, x, path):
        a, b = values[f"{path}.lora_A.weight"], values[f"{path}.lora_B.weight"]
        return x @ layer.weight.T + layer.bias + (6 / 4) * (x @ a.T) @ b.T

    output = with_formula(base(), values, ".lora_A.weight", formula)(**batch())
    compare(attached, output.logits, output.loss, values)


def test_adalora():
    """h = W0 x + (alpha / r) P Lambda Q x; Zhang et al. 2023, equations 3 and 4.

    peft divides by r + 1e-5, and its regulariser is the mean of ||P'P - I||_F and ||QQ' - I||_F over all matrices, not the
    paper's sum of their squares.
    """
    attached = attach("adalora", initial_rank=5, target_rank=3, alpha=6, dropout=0.0, orthogonality=0.3)
    values = leaves(attached)

    def formula(layer, x, path):
        q, e, p = (values[f"{path}.lora_{kind}"] for kind in "AEB")
        return x @ layer.weight.T + layer.bias + (6 / (5 + 1e-5)) * ((x @ q.T) * e.view(-1)) @ p.T

    output = with_formula(base(), values, ".lora_A", formula)(**batch())
    eye = torch.eye(5, dtype=torch.float64)
    far = [torch.linalg.norm(v @ v.T - eye) for n, v in values.items() if n.endswith("lora_A")]
    far += [torch.linalg.norm(v.T @ v - eye) for n, v in values.items() if n.endswith("lora_B")]
    compare(attached, output.logits, output.loss + 0.3 * torch.stack(far).mean(), values)


def test_ia3():
    """k' = l_k k, v' = l_v v, h' = W2 (l_ff f(W1 x)); Liu et al. 2022, section 3.3. The bias is in k and v."""
    attached = attach("ia3")
    values = leaves(attached)

    def formula(layer, x, path):
        scale = values[f"{path}.ia3_l"]
        if path.endswith("fc2"):
            return (x * scale.view(-1)) @ layer.weight.T + layer.bias
        return (x @ layer.weight.T + layer.bias) * scale.view(-1)

    output = with_formula(base(), values, ".ia3_l", formula)(**batch())
    ends = {name.split(".")[-2] for name in values}
    assert ends == {"k_proj", "v_proj", "fc2"}
    compare(attached, output.logits, output.loss, values)


def test_bitfit():
    """Every b of h = W x + b, and of the norms; Ben Zaken et al. 2022, section 3."""
    attached = attach("bitfit")
    values = leaves(attached)
    assert values.keys() == {n for n, _ in base().named_parameters() if n.endswith("bias")}
    output = torch.func.functional_call(base(), values, kwargs=batch())
    compare(attached, output.logits, output.loss, values)


def test_prompt_tuning():
    """[p_1 ... p_n; e(x_1) ... e(x_m)]; Lester et al. 2021, section 2. The loss is the text's alone."""
    attached = attach("prompt_tuning", num_virtual_tokens=VIRTUAL)
    values, model, given = leaves(attached), base(), batch()
    prompt = next(iter(values.values()))
    texts = model.get_input_embeddings()(given["input_ids"])
    rows = len(texts)
    embeds = torch.cat([prompt.expand(rows, -1, -1), texts], dim=1)
    labels = torch.cat([torch.full((rows, VIRTUAL), -100), given["labels"]], dim=1)
    logits = model(inputs_embeds=embeds, attention_mask=torch.ones_like(labels)).logits
    compare(attached, logits, cross_entropy(logits, labels), values)


def test_prefix_tuning(monkeypatch):
    """Attention(Q, [P_K; K], [P_V; V]) in every layer; Li and Liang 2021, section 4. The text stands behind the prefix."""
    attached = attach("prefix_tuning", "gpt2", num_virtual_tokens=VIRTUAL)
    values, model, given = leaves(attached), base("gpt2"), batch()
    config = model.config
    flat = next(iter(values.values()))  # prefix, layer x key or value x head x width
    parts = flat.view(VIRTUAL, config.n_layer, 2, config.n_head, -1)

    def formula(module, query, key, value, attention_mask, **_):
        """Scores over prefix and text; a token sees the prefix and what is not behind it; (batch, head, seq, width)."""
        own = parts[:, module.layer_idx].permute(1, 2, 0, 3)
        keys = torch.cat([own[0].expand(len(key), -1, -1, -1), key], dim=2)
        with_values = torch.cat([own[1].expand(len(value), -1, -1, -1), value], dim=2)
        scores = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5
        length = query.shape[2]
        seen = torch.ones(length, VIRTUAL + length).tril(VIRTUAL).bool()
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (shares @ with_values).transpose(1, 2), shares

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "prefix_formula", formula)
    model.config._attn_implementation = "prefix_formula"
    positions = VIRTUAL + torch.arange(given["input_ids"].shape[1])
    logits = model(input_ids=given["input_ids"], position_ids=positions.expand(2, -1)).logits
    compare(attached, logits, cross_entropy(logits, given["labels"]), values)


def test_companion_another_scale_is_noticed():
    attached = attach("lora", rank=4, alpha=6.001, dropout=0.0)
    values = leaves(attached)

    def formula(layer, x, path):
        a, b = values[f"{path}.lora_A.weight"], values[f"{path}.lora_B.weight"]
        return layer(x) + (6 / 4) * (x @ a.T) @ b.T

    output = with_formula(base(), values, ".lora_A.weight", formula)(**batch())
    with pytest.raises(AssertionError):
        compare(attached, output.logits, output.loss, values)


# -- three steps of AdamW, against peft used by hand ----------------------------------------------------------------

BOTH = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BY_HAND = {
    "lora": (
        {"rank": 4, "alpha": 6, "dropout": 0.0},
        lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=BOTH, task_type="CAUSAL_LM"),
    ),
    "adalora": (
        {"initial_rank": 5, "target_rank": 3, "alpha": 6, "dropout": 0.0, "warmup_share": 0.0, "final_share": 0.0},
        lambda: peft.AdaLoraConfig(
            init_r=5, target_r=3, lora_alpha=6, target_modules=BOTH, task_type="CAUSAL_LM", total_step=STEPS, tinit=0,
            tfinal=0, deltaT=1,
        ),
    ),
    "ia3": (
        {},
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], task_type="CAUSAL_LM"
        ),
    ),
    "prompt_tuning": (
        {"num_virtual_tokens": VIRTUAL},
        lambda: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM"),
    ),
    "prefix_tuning": (
        {"num_virtual_tokens": VIRTUAL},
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM"),
    ),
}  # fmt: skip


def three_steps(model, parameters, after_step):
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(step), use_cache=False).loss.backward()
        optimizer.step()
        after_step(step + 1)


@pytest.mark.parametrize("method", BY_HAND)
def test_three_steps_are_those_of_peft_by_hand(method):
    settings, make = BY_HAND[method]
    attached = attach(method, **settings)
    by_hand = peft.get_peft_model(base(), make())
    theirs = dict(by_hand.named_parameters())
    ours = attached.parameters()
    assert set(ours) == {n for n, p in theirs.items() if p.requires_grad and ".ranknum." not in n}
    with torch.no_grad():
        for name, parameter in ours.items():
            theirs[name].copy_(parameter)
    start = {name: p.detach().clone() for name, p in ours.items()}
    attached.begin(Schedule(place_phases([], total_steps=STEPS), STEPS, RATE, 0))
    three_steps(attached.model, ours, attached.after_step)
    allocate = getattr(by_hand.base_model, "update_and_allocate", lambda step: None)
    three_steps(by_hand, {name: theirs[name] for name in ours}, allocate)
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert not torch.equal(parameter, start[name]), name


def test_three_steps_of_bitfit_are_those_of_the_biases_alone():
    attached, by_hand = attach("bitfit"), base()
    ours = attached.parameters()
    theirs = {n: p for n, p in by_hand.named_parameters() if n.endswith("bias")}
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter.requires_grad_(name in theirs)
            if name in theirs:
                parameter.copy_(ours[name])
    ignore = SimpleNamespace(step=lambda step: None).step
    three_steps(attached.model, ours, attached.after_step)
    three_steps(by_hand, theirs, ignore)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
