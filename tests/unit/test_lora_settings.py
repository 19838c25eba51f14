"""LoRA's settings: what they stand for in a model, what they cost, what is refused, and parity with peft used by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny_models
from peftlab.catalog import METHODS
from peftlab.config import build_config
from peftlab.errors import ConfigError, MethodError, TargetError
from peftlab.mapping import map_model
from peftlab.proof import fingerprint
from peftlab.settings import validate
from tiny_runs import PhaseSettings, run, same

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": "both"}


def attach(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, num_layers: int = 2, **settings: Any
) -> tuple[Any, Any]:
    leaf = METHODS.load("lora")
    base = tiny_models.build(name, num_layers).to(dtype)
    made = leaf.attach(
        base, map_model(base), validate(leaf.Settings, LORA | settings), head=tiny_models.HEADS[name], seed=3
    )
    made.model.to(dtype)
    return base, made


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> torch.Tensor:
    model.eval()
    found: torch.Tensor = model(**tiny_models.inputs(name)).logits
    return found


def ranks(made: Any) -> dict[str, int]:
    return {path: layer.r["default"] for path, layer in made._layers.items()}


def train(model: Any, parameters: Any, name: str, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for seed in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(**tiny_models.training_inputs(name, seed=seed)).loss.backward()
        optimizer.step()


PARITY = {
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "patterns": (
        {"rank_pattern": {"attention.value": 4}, "alpha_pattern": {"mlp": 6}},
        {"rank_pattern": {"VALUE": 4}, "alpha_pattern": {"MLP": 6}},
    ),
    "layers": ({"layers": [1]}, {"layers_to_transform": [1]}),
    "lora_only": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "all biases": ({"bias": "all"}, {"bias": "all"}),
}
NAMES = {
    "opt": (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "v_proj", ["fc1", "fc2"]),
    "gpt2": (["c_attn", "c_proj", "c_fc"], "none", ["mlp.c_proj", "c_fc"]),
}


@pytest.mark.parametrize("case", PARITY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_parity_with_peft_by_hand(case: str, name: str) -> None:
    """Forward, gradients and three steps in float64, from the same first values."""
    asked, told = PARITY[case]
    if (case, name) == ("patterns", "gpt2"):
        asked = {"rank_pattern": {"attention": 4}, "alpha_pattern": {"mlp": 6}}
    modules, value, mlp = NAMES[name]
    keys = {"VALUE": [value], "MLP": mlp}
    told = {
        setting: {key: number for k, number in given.items() for key in keys[k]}
        if isinstance(given, dict)
        else given
        for setting, given in told.items()
    }
    if (case, name) == ("patterns", "gpt2"):
        told["rank_pattern"] = {"attn.c_proj": 4, "c_attn": 4}
    _, made = attach(name, dtype=torch.float64, **asked)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules=modules, task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2", **told,
    )  # fmt: skip
    by_hand = peft.get_peft_model(tiny_models.build(name).double(), config).double()
    start = {n: t.clone() for n, t in made.tensors().items()}
    assert start.keys() == peft.get_peft_model_state_dict(by_hand, save_embedding_layers=False).keys()
    peft.set_peft_model_state_dict(by_hand, start)
    theirs = {n: p for n, p in by_hand.named_parameters() if p.requires_grad}
    assert theirs.keys() == made.parameters().keys()
    for model in (made.model, by_hand):
        model.train()
        model(**tiny_models.training_inputs(name)).loss.backward()
    for n, p in made.parameters().items():
        torch.testing.assert_close(p.grad, theirs[n].grad, rtol=1e-10, atol=1e-12)
    train(made.model, made.parameters().values(), name)
    train(by_hand, theirs.values(), name)
    assert not same(made.tensors(), start)
    for n, t in peft.get_peft_model_state_dict(by_hand, save_embedding_layers=False).items():
        torch.testing.assert_close(made.tensors()[n], t, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits(made.model, name), logits(by_hand, name), rtol=1e-10, atol=1e-10)


def test_doras_formula() -> None:
    """h = m (W0 + s B A) x / ||W0 + s B A||."""
    _, made = attach("opt", dtype=torch.float64, use_dora=True)
    train(made.model, made.parameters().values(), "opt")
    layer = next(iter(made._layers.values()))
    a, b = (getattr(layer, kind)["default"].weight for kind in ("lora_A", "lora_B"))
    weight = layer.get_base_layer().weight + 2 * b @ a
    scaled = layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1)
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ (scaled[:, None] * weight).T + layer.get_base_layer().bias)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_counts_by_formula(name: str) -> None:
    def lora(made: Any) -> int:
        return sum(p.numel() for n, p in made.parameters().items() if ".lora_" in n)

    _, plain = attach(name)
    sites = plain.selection.adapted
    assert lora(plain) == sum(2 * (s.in_features + s.out_features) for s in sites)
    _, dora = attach(name, use_dora=True)
    assert lora(dora) - lora(plain) == sum(s.out_features for s in sites)
    _, pattern = attach(name, rank_pattern={"mlp": 5})
    expected = {s.path: 5 if s.group == "mlp" else 2 for s in sites}
    assert ranks(pattern) == expected
    assert lora(pattern) == sum(expected[s.path] * (s.in_features + s.out_features) for s in sites)


def test_the_narrowest_key_decides() -> None:
    path = "model.layers.1.self_attn.q_proj"
    _, made = attach(
        rank_pattern={"attention": 3, "attention.query": 4, "v_proj": 5, path: 6, "self_attn.k_proj": 7}
    )
    found = ranks(made)
    assert found[path] == 6
    assert found["model.layers.0.self_attn.q_proj"] == 4
    assert found["model.layers.0.self_attn.v_proj"] == 5
    assert found["model.layers.0.self_attn.k_proj"] == 7
    assert found["model.layers.0.self_attn.o_proj"] == 3
    assert found["model.layers.0.mlp.up_proj"] == 2


def test_a_path_means_no_other_that_ends_alike() -> None:
    """T5: encoder.block.0... and decoder.block.0...; and layer 1 is not layer 11."""
    path = "model.layers.1.self_attn.q_proj"
    _, made = attach(num_layers=12, rank_pattern={path: 6}, alpha_pattern={path: 9})
    assert {p for p, r in ranks(made).items() if r == 6} == {path}
    assert {p for p, layer in made._layers.items() if layer.lora_alpha["default"] == 9} == {path}
    _, t5 = attach("t5", rank_pattern={"cross_attention.query": 4})
    assert all(r == (4 if ".EncDecAttention.q" in p else 2) for p, r in ranks(t5).items())


def test_experts_have_no_part_in_patterns() -> None:
    with pytest.raises(MethodError, match=r"rank_pattern: peft gives experts held as 3-D parameters"):
        attach("mixtral", rank_pattern={"mlp": 3})
    _, made = attach("mixtral", rank_pattern={"attention": 3}, layers=[1])
    shapes = {p.shape[0] for n, p in made.parameters().items() if "experts" in n and ".lora_A." in n}
    assert shapes == {4}, "two experts of rank 2"
    assert set(ranks(made).values()) == {3}
    assert all(".layers.1." in n for n in made.parameters())


@pytest.mark.parametrize(
    ("layers", "there"),
    [("1-2", {1, 2}), ([0, 3], {0, 3}), (2, {2}), ("0-0", {0}), ((3,), {3}), (None, {0, 1, 2, 3})],
)
def test_layers(layers: Any, there: set[int]) -> None:
    _, made = attach(num_layers=4, layers=layers)
    assert {site.layer for site in made.selection.adapted} == there
    assert any("of each stack" in note for note in made.selection.notes) == (layers is not None)
    assert {int(p.split(".")[2]) for p in made._layers} == there


def test_layers_of_an_encoder_decoder_are_counted_apart() -> None:
    _, made = attach("t5", layers=[1])
    assert {(site.stack, site.layer) for site in made.selection.adapted} == {("encoder", 1), ("decoder", 1)}
    with pytest.raises(TargetError, match=r"no layer 2.*the encoder has 2 layers, the decoder has 2 layers"):
        attach("t5", layers="1-2")


MODULES = [
    ("llama", ["norm"], {"model.norm"}),
    (
        "llama", ["input_layernorm", "model.norm"],
        {"model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.norm"},
    ),
    ("llama", "lm_head", {"lm_head"}),
    ("llama", ["embed_tokens"], {"model.embed_tokens"}),
    ("bert", ["pooler"], {"bert.pooler", "classifier"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "modules", "there"), MODULES)
def test_further_modules_train_whole(name: str, modules: Any, there: set[str], tmp_path: Path) -> None:
    base, made = attach(name, modules_to_save=modules)
    reference = tiny_models.build(name)
    found = {
        n.split(".modules_to_save.")[0].removeprefix("base_model.model.")
        for n in made.parameters()
        if "modules_to_save" in n
    }
    assert found == there
    train(made.model, made.parameters().values(), name)
    answers = logits(made.model, name)
    with made.disabled():
        torch.testing.assert_close(logits(made.model, name), logits(reference, name), rtol=0, atol=1e-6)
    made.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_models.build(name), str(tmp_path))
    torch.testing.assert_close(logits(loaded, name), answers, rtol=0, atol=1e-6)
    assert made.remove() is base
    assert all(torch.equal(t, reference.state_dict()[n]) for n, t in base.state_dict().items())


@pytest.mark.parametrize("asked", ["lm_head", "embed_tokens"])
def test_a_tied_pair_stays_tied(asked: str) -> None:
    _, made = attach("llama_tied", modules_to_save=[asked])
    whole = [p for n, p in made.parameters().items() if "modules_to_save" in n]
    assert len(whole) == 1
    train(made.model, made.parameters().values(), "llama_tied")
    head = made.model.base_model.model.lm_head
    embedding = made.model.base_model.model.model.embed_tokens
    trained = [
        getattr(module, "modules_to_save", {"default": module})["default"].weight
        for module in (head, embedding)
    ]
    assert torch.equal(*trained)
    assert bool([n for n in made.selection.notes if "share one weight" in n]) == (asked == "lm_head")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_biases_train_and_come_back(bias: str, name: str, tmp_path: Path) -> None:
    base, made = attach(name, bias=bias)
    reference = tiny_models.build(name)
    own = {n for n in made.parameters() if n.endswith(".bias") and "modules_to_save" not in n}
    every = {n for n, _ in reference.named_parameters() if n.endswith(".bias")}
    adapted = {f"{site.path}.bias" for site in made.selection.adapted}
    expected = every & adapted if bias == "lora_only" else every - {"classifier.bias"}
    assert set(made.rewritten) == expected
    assert len(own) == len(expected)
    assert {n for n, p in made.model.named_parameters() if p.requires_grad} == set(made.parameters())
    train(made.model, made.parameters().values(), name)
    answers = logits(made.model, name)
    kept = made.tensors()
    with made.disabled():
        torch.testing.assert_close(logits(made.model, name), logits(reference, name), rtol=0, atol=1e-6)
    assert torch.equal(logits(made.model, name), answers)
    made.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_models.build(name), str(tmp_path))
    torch.testing.assert_close(logits(loaded, name), answers, rtol=0, atol=1e-6)
    _, again = attach(name, bias=bias)
    again.load_saved(tmp_path)
    assert same(again.tensors(), kept)
    assert made.remove() is base
    changed = [
        n for n, t in base.state_dict().items() if fingerprint(t) != fingerprint(reference.state_dict()[n])
    ]
    assert changed == []


def test_a_run_with_everything_on(tmp_path: Path) -> None:
    settings = LORA | {
        "use_dora": True, "use_rslora": True, "init": "pissa", "bias": "all", "modules_to_save": ["norm"],
        "layers": "0-1", "rank_pattern": {"mlp": 4}, "dropout": 0.1,
    }  # fmt: skip
    done = run(
        tmp_path,
        settings=settings,
        phases=(PhaseSettings(groups=("attention", "mlp", "other")),),
        save_steps=6,
    )
    assert len(done.told("phase_proved")) == 1
    resumed = run(
        tmp_path / "again", settings=settings, phases=(PhaseSettings(groups=("attention", "mlp", "other")),),
        resume=tmp_path / "checkpoint-6", save_steps=6,
    )  # fmt: skip
    assert same(resumed.tensors, done.tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "3-1"}, r"layers.*FIRST <= LAST"),
        ({"layers": []}, r"at least one is needed"),
        ({"layers": [1, 1]}, r"each is named once"),
        ({"layers": "all"}, r"must be a range"),
        ({"rank_pattern": {"mlp": 0}}, r"'mlp' must have a value above 0"),
        ({"rank_pattern": {"mlp": "x"}}, r"rank_pattern.*integer"),
        ({"rank_pattern": 3}, r"rank_pattern.*keys and values"),
        ({"lora_plus_ratio": 4}, r"lora_plus_ratio has an effect only where optimizer is lora_plus"),
        ({"optimizer": "lora_plus", "lora_plus_ratio": 0.5}, r"lora_plus_ratio.*greater than or equal to 1"),
        ({"optimizer": "lora_fa", "use_dora": True}, r"lora_fa pairs A with B.*use_dora=false"),
        ({"optimizer": "sgd"}, r"optimizer.*'adamw', 'lora_plus' or 'lora_fa'"),
        ({"bias": "some"}, r"bias.*'none', 'all' or 'lora_only'"),
        ({"use_dorra": True}, r"did you mean 'use_dora'"),
    ],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"method": {"name": "lora"} | settings})


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        (
            "llama", {"rank_pattern": {"mlp": 4}, "targets": "attention"}, TargetError,
            r"rank_pattern: 'mlp' matches nothing that is adapted; adapted roles: attention.key",
        ),
        ("llama", {"alpha_pattern": {"q_prj": 4}}, TargetError, r"alpha_pattern: 'q_prj' matches.*did you mean 'q_proj'"),
        ("llama", {"rank_pattern": {"proj": 4}}, TargetError, r"'proj' matches nothing"),
        (
            "llama", {"rank_pattern": {"self_attn.q_proj": 4, "0.self_attn.q_proj": 3, "1.self_attn.q_proj": 3}},
            TargetError, r"'self_attn.q_proj' decides nothing",
        ),
        ("llama", {"rank_pattern": {"attention": 4, "both": 3}}, TargetError, r"'attention' and 'both' disagree"),
        ("llama", {"layers": "0-2"}, TargetError, r"no layer 2, counted from 0: the model has 2 layers"),
        ("llama", {"modules_to_save": ["nrm"]}, TargetError, r"no module 'nrm'.*did you mean 'norm'"),
        ("llama", {"modules_to_save": ["q_proj"]}, MethodError, r"'model.layers.0.self_attn.q_proj' would be trained whole"),
        ("llama", {"modules_to_save": ["mlp"]}, MethodError, r"'model.layers.0.mlp' would be trained whole, and"),
        ("llama", {"modules_to_save": ["layers"], "targets": "attention"}, MethodError, r"is a list of modules"),
        ("llama", {"modules_to_save": ["act_fn"]}, MethodError, r"has no parameters"),
        ("t5", {"bias": "all"}, MethodError, r"no biases in this model"),
        ("mixtral", {"use_dora": True}, MethodError, r"use_dora=true.*experts held as 3-D"),
        ("mixtral", {"optimizer": "lora_fa"}, MethodError, r"optimizer=lora_fa.*experts"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_a_model(
    name: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attach(name, **settings)


def test_biases_of_bfloat16_are_refused() -> None:
    with pytest.raises(MethodError, match=r"bias=all: .* is bfloat16.*model.dtype=float32"):
        attach("llama", dtype=torch.bfloat16, bias="all")


def test_a_config_reads_patterns_and_layers() -> None:
    config = build_config(
        {"method": {"name": "lora", "rank_pattern": {"attention": {"query": 4}, "mlp": 2}, "layers": "0-1"}}
    )
    settings = METHODS.load("lora").Settings(**config.adapters[0].settings)
    assert settings.rank_pattern == {"attention.query": 4, "mlp": 2}
    assert settings.layers == (0, 1)
