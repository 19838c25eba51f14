"""How LoRA starts: the base's answers at first, the base back afterwards, a plain adapter on disk, a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from peftlab.batches import Collator
from peftlab.catalog import METHODS
from peftlab.mapping import map_model
from peftlab.proof import fingerprint
from tiny_runs import STEPS, make_rows, run, same

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": "both"}
FROM_DATA = ["eva", "lora_ga", "corda"]
REWRITING = ["pissa", "pissa_niter_4", "olora", "lora_ga", "corda"]
STARTS = ["default", "gaussian", "orthogonal", "eva", *REWRITING]
BARS = {"default": 0.0, "gaussian": 0.0, "eva": 0.0, "orthogonal": 1e-5}
"""How far the first answers may be from the base's in float32; 1e-4 for the others."""
MODELS = ["llama", "gpt2", "t5"]


def skip_without_attrs(init: str) -> None:
    if init == "corda":
        pytest.importorskip("attr", reason="peft 0.21's CorDA needs the package attrs")


def cases() -> list[Any]:
    """Every start on Llama, those that touch the base or see rows elsewhere too; EVA on T5 is in the runs below."""
    seldom = {"default", "gaussian", "orthogonal", "pissa_niter_4"}
    left_out = {("olora", "gpt2"), ("eva", "t5"), *((init, name) for init in seldom for name in MODELS[1:])}
    return [(init, name) for init in STARTS for name in MODELS if (init, name) not in left_out]


def batches(name: str, *, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of rows of different lengths, as a run collates them."""
    head = tiny_models.HEADS[name]
    rows, collate = make_rows(head, 4 * count), Collator(0, head)
    return [collate(rows[4 * i : 4 * i + 4]) for i in range(count)]


def attach(
    init: str, name: str = "llama", *, dtype: torch.dtype = torch.float32, rows: bool = True, **settings: Any
) -> tuple[Any, Any]:
    skip_without_attrs(init)
    leaf = METHODS.load("lora")
    base = tiny_models.build(name).to(dtype)
    made = leaf.attach(
        base,
        map_model(base),
        leaf.Settings(**LORA | {"init": init} | settings),
        head=tiny_models.HEADS[name],
        seed=3,
    )
    if rows and init in FROM_DATA:
        made.prepare(batches(name))
    made.model.eval()
    return base, made


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> torch.Tensor:
    found: torch.Tensor = model(**tiny_models.inputs(name)).logits
    return found


def train(made: Any, name: str, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(made.parameters().values(), lr=1e-2)
    made.model.train()
    for seed in range(steps):
        optimizer.zero_grad(set_to_none=True)
        made.model(**tiny_models.training_inputs(name, seed=seed)).loss.backward()
        optimizer.step()
    made.model.eval()


@pytest.mark.parametrize(("init", "name"), cases())
def test_the_model_answers_as_the_base_at_first(init: str, name: str) -> None:
    _, made = attach(init, name, use_dora=name == "gpt2")
    expected = logits(tiny_models.build(name), name)
    torch.testing.assert_close(logits(made.model, name), expected, rtol=0, atol=BARS.get(init, 1e-4) or 1e-6)


@pytest.mark.parametrize("init", ["default", "gaussian", "eva", *REWRITING])
@pytest.mark.parametrize("dora", [False, True])
def test_it_does_so_to_1e_10_in_float64(init: str, dora: bool) -> None:
    """OPT: its norms compute in the dtype of the model."""
    _, made = attach(init, "opt", dtype=torch.float64, use_dora=dora)
    expected = logits(tiny_models.build("opt").double(), "opt")
    torch.testing.assert_close(logits(made.model, "opt"), expected, rtol=0, atol=1e-10)
    b_is_zero = all(
        not t.any() for n, t in made.tensors().items() if n.endswith("lora_B.weight") and "first" not in n
    )
    assert b_is_zero == (init in BARS)


@pytest.mark.parametrize(("init", "name"), cases())
def test_the_base_comes_back(init: str, name: str) -> None:
    reference = tiny_models.build(name)
    base, made = attach(init, name)
    train(made, name)
    answers = logits(made.model, name)
    assert not torch.equal(answers, logits(reference, name))
    changed = {
        n for n, p in reference.named_parameters() if fingerprint(p) != fingerprint(base_tensor(made, n))
    }
    assert changed == set(made.rewritten)
    assert bool(changed) == (init in REWRITING)
    with made.disabled():
        assert all(torch.equal(p, base_tensor(made, n)) for n, p in reference.named_parameters())
        torch.testing.assert_close(logits(made.model, name), logits(reference, name), rtol=0, atol=1e-6)
    assert torch.equal(logits(made.model, name), answers)
    assert made.remove() is base
    before, after = reference.state_dict(), base.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert made.rewritten == ()


def base_tensor(made: Any, name: str) -> torch.Tensor:
    """A tensor of the base below peft's layers, by its name in the base."""
    path, _, last = name.rpartition(".")
    module = made.model.base_model.model.get_submodule(path)
    module = getattr(module, "original_module", getattr(module, "base_layer", module))
    found: torch.Tensor = getattr(module, last)
    return found


@pytest.mark.parametrize("init", REWRITING)
@pytest.mark.parametrize(
    "more",
    [
        {}, {"use_rslora": True}, {"use_dora": True},
        {"rank_pattern": {"mlp": 4}, "alpha_pattern": {"attention.query": 12}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "dora", "patterns"],
)  # fmt: skip
def test_anybodys_peft_loads_it_on_the_untouched_base(
    init: str, more: dict[str, Any], tmp_path: Path
) -> None:
    _, made = attach(init, "bert", dtype=torch.float64, **more)
    made.model.double()
    train(made, "bert")
    made.save(tmp_path)
    answers = logits(made.model, "bert")
    untouched = tiny_models.build("bert").double()
    loaded = peft.PeftModel.from_pretrained(untouched, str(tmp_path), autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(logits(loaded, "bert"), answers, rtol=0, atol=1e-10)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 4
    head = tiny_models.build("bert").double().classifier.weight
    assert not torch.equal(
        dict(loaded.named_parameters())[
            next(n for n, _ in loaded.named_parameters() if "modules_to_save" in n and n.endswith("weight"))
        ],
        head,
    )


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_saved_is_put_back(init: str, dora: bool, tmp_path: Path) -> None:
    _, made = attach(init, "gpt2" if init != "olora" else "bert", use_dora=dora)
    name = "gpt2" if init != "olora" else "bert"
    train(made, name)
    made.save(tmp_path / "one")
    base, again = attach(init, name, use_dora=dora, rows=False)
    again.load_saved(tmp_path / "one")
    torch.testing.assert_close(logits(again.model, name), logits(made.model, name), rtol=0, atol=1e-5)
    assert again.rewritten == ()
    again.save(tmp_path / "two")
    one, two = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("one", "two"))
    assert same(one, two)
    with again.disabled():
        assert torch.equal(logits(again.model, name), logits(tiny_models.build(name), name))
    train(again, name)
    assert again.remove() is base
    reference = tiny_models.build(name).state_dict()
    assert all(torch.equal(tensor, reference[n]) for n, tensor in base.state_dict().items())


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights", "ignore:Note that Quant")
def test_the_conversion_is_pefts_own(tmp_path: Path) -> None:
    """As save_pretrained(path_initial_model_for_weight_conversion=...) of peft makes it; that loses heads, and this not."""
    _, made = attach("pissa", "opt", dtype=torch.float64)
    base = tiny_models.build("opt").double()
    layers = made._layers
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(layers), task_type="CAUSAL_LM", lora_dropout=0.0
    )
    by_hand = peft.get_peft_model(base, config)
    by_hand.peft_config["default"].init_lora_weights = "pissa"
    start = {n.removeprefix("first."): t for n, t in made.tensors().items() if n.startswith("first.")}
    peft.set_peft_model_state_dict(by_hand, start)
    by_hand.save_pretrained(str(tmp_path / "pissa_init"), save_embedding_layers=False)
    file = tmp_path / "pissa_init" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
    train(made, "opt")
    trained = {n: t for n, t in made.tensors().items() if not n.startswith("first.")}
    peft.set_peft_model_state_dict(by_hand, trained)
    by_hand.save_pretrained(
        str(tmp_path / "peft"),
        path_initial_model_for_weight_conversion=str(tmp_path / "pissa_init"),
        save_embedding_layers=False,
    )
    made.save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    mine, its = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "peft"))
    assert (mine["r"], mine["lora_alpha"]) == (its["r"], its["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_and_b_are_pefts_own(init: str, name: str) -> None:
    if (init, name) == ("olora", "gpt2"):
        pytest.skip("refused: Conv1D")
    _, made = attach(init, name)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(made._layers), init_lora_weights=init, fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    by_hand = peft.get_peft_model(tiny_models.build(name), config).eval()
    theirs = peft.get_peft_model_state_dict(by_hand, save_embedding_layers=False)
    ours = {n: t for n, t in made.tensors().items() if not n.startswith("first.")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for path, layer in made._layers.items():
        residual = by_hand.base_model.model.get_submodule(path).get_base_layer().weight
        torch.testing.assert_close(layer.get_base_layer().weight, residual, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:lora with eva init", "ignore:Full backward hook is firing")
def test_eva_and_lora_ga_are_pefts_own() -> None:
    rows = [tiny_models.training_inputs("llama", batch=4, seed=i) for i in range(4)]
    for row in rows:
        row["labels"][:, :3] = -100  # EVA looks at labelled tokens alone
    for init in ("eva", "lora_ga"):
        _, made = attach(init, rows=False)
        made.prepare(rows)
        base = tiny_models.build("llama")
        config = peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=list(made._layers), init_lora_weights=init, task_type="CAUSAL_LM",
            eva_config=peft.EvaConfig(rho=1.0) if init == "eva" else None,
            lora_ga_config=peft.LoraGAConfig() if init == "lora_ga" else None,
        )  # fmt: skip
        if init == "eva":
            by_hand = peft.get_peft_model(base, config)
            peft.initialize_lora_eva_weights(by_hand, rows, show_progress_bar=False)
        else:
            from peft.tuners.lora.loraga import preprocess_loraga

            preprocess_loraga(base, config, lambda: [base(**row).loss.backward() for row in rows])  # noqa: B023
            by_hand = peft.get_peft_model(base, config)
        theirs = peft.get_peft_model_state_dict(by_hand, save_embedding_layers=False)
        ours = made.tensors()
        for name, tensor in theirs.items():
            kind = "lora_A" if "lora_A" in name else "lora_B"
            if init == "lora_ga":  # the SVD is drawn: what it spans is the same
                tensor, other = tensor.abs(), ours[name].abs()
            else:
                other = ours[name]
            torch.testing.assert_close(
                other, tensor, rtol=1e-2, atol=1e-3, msg=lambda m, n=name, k=kind: f"{n} {k}: {m}"
            )


@pytest.mark.parametrize(
    ("init", "name"), [("pissa", "llama"), ("eva", "t5"), ("lora_ga", "bert"), ("corda", "llama")]
)
def test_a_run_goes_on_bit_equal(init: str, name: str, tmp_path: Path) -> None:
    skip_without_attrs(init)
    setup: dict[str, Any] = {"settings": LORA | {"init": init, "dropout": 0.1}, "batch_size": 4}
    setup |= {"save_steps": 7, "validation_steps": 7, "keep": STEPS, "probe": False}
    whole = run(tmp_path / "whole", name, **setup)
    assert len(whole.told("phase_proved")) == 3
    resumed = run(tmp_path / "resumed", name, resume=tmp_path / "whole" / "checkpoint-7", **setup)
    assert same(resumed.tensors, whole.tensors)
    for path, layer in resumed.attachment._layers.items():
        other = whole.attachment._layers[path].get_base_layer().weight
        assert torch.equal(layer.get_base_layer().weight, other)


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "olora"])
def test_merged_is_adapted(init: str) -> None:
    base, made = attach(init, "bert")
    train(made, "bert")
    answers = logits(made.model, "bert")
    assert made.merge() is base
    torch.testing.assert_close(logits(base, "bert"), answers, rtol=0, atol=1e-5)
    assert made.rewritten == ()
    assert [n for n, _ in base.named_parameters()] == [
        n for n, _ in tiny_models.build("bert").named_parameters()
    ]


@pytest.mark.parametrize("init", STARTS)
def test_law_1s_steps(init: str) -> None:
    _, made = attach(init)
    names = made.parameters()
    assert {made.steps_to_train(n) for n in names if ".lora_B." in n} == {1}
    assert {made.steps_to_train(n) for n in names if ".lora_A." in n} == {
        2 if init in ("default", "gaussian", "eva") else 1
    }
    made.model.train()
    made.model(**tiny_models.training_inputs("llama")).loss.backward()
    for name, parameter in names.items():
        assert bool(parameter.grad.any()) == (made.steps_to_train(name) == 1), name


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_a_base_of_bfloat16(init: str) -> None:
    base, made = attach(init, dtype=torch.bfloat16)
    expected = logits(tiny_models.build("llama").bfloat16())
    difference = (logits(made.model) - expected).abs().max() / expected.abs().max()
    assert difference < 0.05
    assert {p.dtype for p in made.parameters().values()} == {torch.float32}
    train(made, "llama")
    made.remove()
    reference = tiny_models.build("llama").bfloat16().state_dict()
    assert all(torch.equal(t, reference[n]) for n, t in base.state_dict().items())
