"""The experiments: each tells what it should on modules whose purpose is known, and nothing where there is nothing."""

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Config

import tiny_models
from peftlab.certificate import Certificate
from peftlab.mapping import attribution, certifying
from peftlab.mapping.attribution import Bench, attribute_mixer, attribute_mlp
from peftlab.mapping.certifying import certify, layers_needed, prove_config
from peftlab.mapping.outputs import compare_head, compare_outputs
from peftlab.mapping.positions import Reach, Shape, depends_on_more, reach
from peftlab.mapping.trace import Call, equal, noise_on, record

WIDTH, LENGTH = 16, 12
SHAPE = Shape(2, LENGTH)


class Attention(nn.Module):
    """Plain softmax attention that no interface sees; `row` says what is done with the scores."""

    def __init__(self, row=lambda scores: scores.softmax(-1), gated=False):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.five = nn.Linear(WIDTH, WIDTH) if gated else None
        self.row = row

    def forward(self, hidden):
        q, k, v = self.two(hidden), self.three(hidden), self.one(hidden)
        mixed = self.row(q @ k.transpose(-1, -2)) @ v
        if self.five is not None:
            mixed = mixed * self.five(hidden).sigmoid()
        return self.four(mixed)


class Mlp(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.gated = gated

    def forward(self, hidden):
        first = torch.nn.functional.silu(self.a(hidden))
        return self.c(first * self.b(hidden) if self.gated else first)


def bench(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, LENGTH, WIDTH)
    call = Call((hidden,), {}, module(hidden).detach())
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    return Bench(module, call, layers, [])


def test_query_key_value_and_output_are_told_apart_by_reach():
    roles, evidence = attribute_mixer(bench(Attention()), SHAPE)
    assert roles == {"one": "value", "two": "query", "three": "key", "four": "output"}
    assert evidence == "reach"


def test_mixing_without_rows_that_sum_to_one_is_not_attention():
    """The companion: linear attention has queries, keys and values in name only, so nothing is attributed."""
    roles, evidence = attribute_mixer(bench(Attention(row=lambda scores: scores / LENGTH)), SHAPE)
    assert evidence == ""
    assert not {"query", "key", "value"} & set(roles.values())


def test_a_fused_layer_and_a_gate_are_seen():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden):
            q, k, v = self.all(hidden).chunk(3, -1)
            return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    assert attribute_mixer(bench(Fused()), SHAPE)[0] == {"all": "qkv", "out": "output"}


def test_cross_attention_is_told_apart_by_reach():
    class Cross(Attention):
        def forward(self, hidden, other):
            q, k, v = self.two(hidden), self.three(other), self.one(other)
            return self.four((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    torch.manual_seed(0)
    module = Cross()
    hidden, other = torch.randn(2, LENGTH, WIDTH), torch.randn(2, 9, WIDTH)
    call = Call((hidden, other), {}, module(hidden, other).detach())
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    roles, evidence = attribute_mixer(Bench(module, call, layers, []), SHAPE, Shape(2, 9))
    assert roles == {"one": "value", "two": "query", "three": "key", "four": "output"}
    assert evidence == "reach"
    assert attribute_mixer(Bench(module, call, layers, []), SHAPE)[1] == "", (
        "not without knowing the other sequence"
    )


def test_gate_up_and_down_are_told_apart():
    assert attribute_mlp(bench(Mlp(gated=True))) == {"a": "gate", "b": "up", "c": "down"}
    plain = attribute_mlp(bench(Mlp(gated=False)))
    assert (plain["a"], plain["c"]) == ("up", "down")


def test_reach_sees_causality_and_position_wise_work():
    def reach_of(module, hidden=None):
        hidden = torch.randn(2, LENGTH, WIDTH) if hidden is None else hidden
        return reach(module, Call((hidden,), {}, module(hidden)), SHAPE)

    class Past(nn.Module):
        def forward(self, hidden):
            return hidden.cumsum(1)

    class PastSequenceFirst(nn.Module):
        def forward(self, hidden):
            return hidden.cumsum(0)

    assert reach_of(Past()) == Reach(here=True, earlier=False, later=True)
    assert reach_of(nn.Tanh()) == Reach(here=True, earlier=False, later=False)
    assert reach_of(PastSequenceFirst(), torch.randn(LENGTH, 2, WIDTH)) == Reach(
        here=True, earlier=False, later=True
    )
    assert reach_of(nn.Tanh(), torch.randn(2 * LENGTH, WIDTH)) == Reach(here=True, earlier=False, later=False)


def test_a_part_that_reads_another_sequence_is_not_position_wise():
    class Beside(nn.Module):
        def forward(self, hidden, other):
            return hidden + other.mean(1, keepdim=True) if other.shape[1] != LENGTH else hidden + other

    def depends(other):
        hidden, module = torch.randn(2, LENGTH, WIDTH), Beside()
        return depends_on_more(module, Call((hidden, other), {}, module(hidden, other)), SHAPE)

    assert depends(torch.randn(2, 7, WIDTH)), "global tokens, another stack"
    assert not depends(torch.randn(2, LENGTH, WIDTH)), "a residual stream at the same position"


def test_recorded_values_survive_changes_in_place():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = Branch()

        def forward(self, x):
            out = self.branch(x)
            out += 1
            return out

    calls, output = record(Model(), {"x": torch.ones(1, 2)})
    assert torch.equal(calls["branch"][0].result, torch.full((1, 2), 2.0))
    assert torch.equal(output, torch.full((1, 2), 3.0))


def test_noise_is_gone_when_the_context_ends():
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    with torch.no_grad():
        before = layer(x)
        with noise_on(layer):
            assert not equal(layer(x), before)
        assert torch.equal(layer(x), before)


def test_outputs_are_compared_in_every_layout():
    states = tuple(torch.randn(2, 5, 4) for _ in range(3))
    assert compare_outputs(states[1:], [states], []) == ("equal", "bsh")
    assert compare_outputs([s.transpose(0, 1) for s in states[1:]], [states], []) == ("equal", "sbh")
    assert compare_outputs([s.transpose(1, 2) for s in states[1:]], [states], []) == ("equal", "bhs")
    assert compare_outputs(states[:2], [states], [])[0] == "equal, without the embeddings before them"
    other = [states[1], torch.randn(2, 5, 4)]
    assert compare_outputs(other, [states], [])[0] == "output of layer 1 is another tensor"
    assert compare_outputs(other, [states], [states[2]])[0] == "equal", "the last one behind a final norm"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda x: x, "equal"),
        (lambda x: x / 7, "scaled"),
        (lambda x: 30 * torch.tanh(x / 30), "softcapped"),
        (lambda x: x + torch.linspace(0, 1, 9), "biased"),
        (lambda x: x**2, "other"),
    ],
)
def test_the_head_is_compared_with_the_logits(change, verdict):
    head = 20 * torch.randn(2, 5, 9)
    assert compare_head(change(head), head) == verdict


def test_a_certificate_comes_back_from_json_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(certifying, "_known", {})
    model = tiny_models.build("llama", 4)
    made = certify(model)
    assert made.problem == ""
    (file,) = (tmp_path / "certificates").iterdir()
    assert Certificate.from_json(json.loads(file.read_text())) == made
    monkeypatch.setattr(certifying, "_known", {})
    monkeypatch.setattr(certifying, "_prove", lambda *_: pytest.fail("it stands in the cache"))
    assert certify(model) == made
    assert certify(tiny_models.build("llama", 9)) == made, "sizes do not matter"


def test_a_damaged_certificate_is_proved_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(certifying, "_known", {})
    model = tiny_models.build("bert")
    made = certify(model)
    (file,) = (tmp_path / "certificates").iterdir()
    file.write_text("{")
    monkeypatch.setattr(certifying, "_known", {})
    again = certify(model)
    assert (again.stacks, again.head) == (made.stacks, made.head)
    assert json.loads(file.read_text())["model_class"] == "BertForSequenceClassification"


def test_a_twin_has_every_make_of_block():
    model = tiny_models.build("mixtral", 6)
    assert layers_needed(model) == 4
    blocks = model.model.layers
    blocks[5].mlp.extra = nn.Linear(2, 2)
    assert layers_needed(model) == 6


def test_what_cannot_run_is_a_problem_with_its_reason(monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(certifying, "twin_inputs", broken)
    from transformers import GPT2LMHeadModel

    twin, certificate, _ = prove_config(GPT2LMHeadModel, GPT2Config())
    assert twin is None
    assert certificate.problem == "no tiny twin of it runs (RuntimeError: no such thing)"


def test_an_mlp_behind_a_mixer_is_not_taken_for_its_output(monkeypatch):
    """A part that holds attention and an MLP: what is fed with more than the output layer's output is the MLP's."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = Attention(), Mlp(gated=False)

        def forward(self, hidden):
            return self.mlp(hidden + self.attention(hidden))

    roles, _ = attribute_mixer(bench(Both()), SHAPE)
    assert {roles["mlp.a"], roles["mlp.c"]} == {"behind"}
    assert roles["attention.four"] == "output"
    monkeypatch.setattr(attribution, "_same_values", lambda *_: True)
    assert attribute_mixer(bench(Both()), SHAPE)[0]["mlp.a"] == "output", "the companion"


def test_what_the_caller_has_set_does_not_reach_the_proof(tmp_path, monkeypatch):
    """Autocast, a default device, a default dtype, the random stream: the certificate is the same, the stream untouched."""
    model = tiny_models.build("llama", 4)
    plain = certify(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    contexts = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "meta": torch.device("meta"),
        "flash": torch.inference_mode(),
    }
    for name, context in contexts.items():
        monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / name))
        monkeypatch.setattr(certifying, "_known", {})
        torch.manual_seed(5)
        before = torch.get_rng_state()
        with context:
            made = certify(model)
        assert (made.problem, made.stacks, made.head) == ("", plain.stacks, plain.head), name
        assert torch.equal(torch.get_rng_state(), before), name


def test_a_problem_is_not_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(certifying, "_known", {})
    model = tiny_models.build("gpt2", 4)
    with monkeypatch.context() as broken:
        broken.setattr(certifying, "twin_inputs", lambda _: {})
        assert certify(model).problem
    assert certify(model).problem == ""


def test_other_code_is_another_architecture(tmp_path):
    file = tmp_path / "mymodel.py"
    file.write_text("import torch.nn as nn\nclass Layer(nn.Linear):\n    pass\n")
    spec = importlib.util.spec_from_file_location("mymodel", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mymodel"] = module
    spec.loader.exec_module(module)
    try:
        model = nn.Sequential(module.Layer(2, 2))
        before = certifying._foreign_code(model)
        file.write_text(file.read_text() + "    other = True\n")
        assert certifying._foreign_code(model) != before
        assert certifying._foreign_code(nn.Sequential(nn.Linear(2, 2))) == []
        module.Layer.__module__ = "written_in_a_notebook"
        assert certifying._foreign_code(model) is None, "it may change at any time: nothing is kept"
    finally:
        del sys.modules["mymodel"]
