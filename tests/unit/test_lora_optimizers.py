"""LoRA+ and LoRA-FA: peft's own steps, and what a run asks of an optimizer: phases, resume, proof."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

import tiny_models
import tiny_runs
from peftlab.catalog import METHODS
from peftlab.mapping import map_model
from peftlab.schedule import PhaseSettings
from tiny_runs import RATE, STEPS, run, same

LORA = {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": "both"}
PHASED = (
    PhaseSettings(steps=4),
    PhaseSettings(steps=4, groups=("mlp",), moments="reset"),
    PhaseSettings(groups=("attention",), moments="reset"),
)
EVERY = {"save_steps": 1, "validation_steps": 3, "keep": STEPS}


@pytest.fixture(autouse=True)
def _several_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher of tiny runs expects one learning rate; LoRA+ has two."""
    monkeypatch.setattr(tiny_runs.Watcher, "on_pre_optimizer_step", lambda *_, **__: None)


def attach(name: str = "llama", **settings: Any) -> Any:
    leaf = METHODS.load("lora")
    base = tiny_models.build(name).double()
    made = leaf.attach(
        base,
        map_model(base),
        leaf.Settings(**LORA | {"dropout": 0.0} | settings),
        head=tiny_models.HEADS[name],
        seed=3,
    )
    made.model.double()
    return made


def steps(model: Any, optimizer: Any, name: str, count: int = 3) -> None:
    for seed in range(count):
        optimizer.zero_grad(set_to_none=True)
        model(**tiny_models.training_inputs(name, seed=seed)).loss.backward()
        optimizer.step()


def options(rate: float = 1e-2) -> dict[str, Any]:
    return {"lr": rate, "betas": (0.9, 0.999), "eps": 1e-8}


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_takes_pefts_steps(name: str, dora: bool) -> None:
    ours, theirs = (attach(name, optimizer="lora_plus", lora_plus_ratio=5, use_dora=dora) for _ in range(2))
    one = ours.make_optimizer(torch.optim.AdamW, options(), weight_decay=0.1)
    two = create_loraplus_optimizer(
        theirs.model, torch.optim.AdamW, loraplus_lr_ratio=5, loraplus_weight_decay=0.1, **options()
    )
    steps(ours.model, one, name)
    steps(theirs.model, two, name)
    assert same(ours.tensors(), theirs.tensors())
    rates = {
        n: g["lr"]
        for g in one.param_groups
        for p in g["params"]
        for n, q in ours.parameters().items()
        if p is q
    }
    assert rates.keys() == ours.parameters().keys()
    for parameter, rate in rates.items():
        fast = ".lora_B." in parameter or ours.parameters()[parameter].dim() == 1
        assert rate == pytest.approx(5e-2 if fast else 1e-2), parameter


def test_lora_fa_takes_pefts_steps() -> None:
    settings = {"optimizer": "lora_fa", "use_rslora": True, "rank_pattern": {"mlp": 4}}
    ours, theirs = attach(**settings), attach(**settings)
    before = ours.tensors()
    one = ours.make_optimizer(torch.optim.AdamW, options(), weight_decay=0.1)
    two = create_lorafa_optimizer(theirs.model, r=2, lora_alpha=4, lr=1e-2, weight_decay=0.1)
    steps(ours.model, one, "llama")
    steps(theirs.model, two, "llama")
    after = ours.tensors()
    assert same(after, theirs.tensors())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_B." in name}


def test_lora_fa_follows_the_papers_formula() -> None:
    """g_B (A A')^-1 / s^2 in AdamW, by hand; peft takes the product in bfloat16 where the machine has it."""
    ours = attach(optimizer="lora_fa", targets="attention.query")
    one = ours.make_optimizer(torch.optim.AdamW, options(), weight_decay=0.0)
    ours.model(**tiny_models.training_inputs("llama")).loss.backward()
    path, layer = next(iter(ours._layers.items()))
    a, b = (getattr(layer, kind)["default"].weight.detach() for kind in ("lora_A", "lora_B"))
    gradient = layer.lora_B["default"].weight.grad @ torch.linalg.inv(a @ a.T + 1e-8 * torch.eye(2)) / 4
    first, second = 0.1 * gradient, 0.001 * gradient**2
    expected = b - 1e-2 * math.sqrt(0.001) / 0.1 * first / (second.sqrt() + 1e-6)
    one.step()
    torch.testing.assert_close(layer.lora_B["default"].weight.detach(), expected, rtol=2e-2, atol=1e-6), path


def test_lora_fa_counts_b_alone() -> None:
    plain, frozen = attach(), attach(optimizer="lora_fa")
    assert set(frozen.parameters()) == {n for n in plain.parameters() if ".lora_A." not in n}
    assert all(frozen.steps_to_train(name) == 1 or ".lora_A." in name for name in plain.parameters())
    assert {n for n, p in frozen.model.named_parameters() if p.requires_grad} == set(frozen.parameters())


@pytest.mark.parametrize(("optimizer", "name"), [("lora_plus", "llama"), ("lora_fa", "bert")])
def test_a_run_trains_and_goes_on_bit_equal(optimizer: str, name: str, tmp_path: Any) -> None:
    setup: dict[str, Any] = {"settings": LORA | {"optimizer": optimizer}, "phases": PHASED}
    whole = run(tmp_path / "whole", name, **setup, **EVERY)
    assert len(whole.told("phase_proved")) == 3
    for step in (5, 8):
        resumed = run(
            tmp_path / str(step), name, resume=tmp_path / "whole" / f"checkpoint-{step}", **setup,
            **EVERY | {"save_steps": STEPS},
        )  # fmt: skip
        assert same(resumed.tensors, whole.tensors), f"cut after step {step}"


def test_the_two_rates_follow_one_schedule(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[float]] = {}

    def look(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen[state.global_step] = [group["lr"] for group in kwargs["optimizer"].param_groups]

    monkeypatch.setattr(tiny_runs.Watcher, "on_pre_optimizer_step", look)
    done = run(tmp_path, settings=LORA | {"optimizer": "lora_plus", "lora_plus_ratio": 4}, phases=PHASED)
    schedule = done.trainer.parts.schedule
    for step, (slow, fast) in seen.items():
        assert slow == pytest.approx(schedule.learning_rate_at(step))
        assert fast == pytest.approx(4 * slow)
    assert max(slow for slow, _ in seen.values()) <= RATE


def test_a_resting_pair_of_lora_fa_stays() -> None:
    ours = attach(optimizer="lora_fa")
    optimizer = ours.make_optimizer(torch.optim.AdamW, options(), weight_decay=0.1)
    steps(ours.model, optimizer, "llama", 1)
    resting = [p for n, p in ours.parameters().items() if ".mlp." in n]
    for parameter in resting:
        parameter.requires_grad_(False)
    before = [p.detach().clone() for p in resting]
    steps(ours.model, optimizer, "llama", 2)
    assert all(torch.equal(p, q) for p, q in zip(resting, before, strict=True))
    assert {optimizer.state[p]["step"] for p in resting} == {1}
    assert {s["step"] for p, s in optimizer.state.items() if all(p is not q for q in resting)} == {3}
    assert set(optimizer.state) == set(ours.parameters().values())


def test_the_default_optimizer_is_the_trainers(tmp_path: Any) -> None:
    assert attach().make_optimizer(torch.optim.AdamW, options(), weight_decay=0.1) is None
    done = run(tmp_path, settings=LORA, phases=PHASED)
    inner = getattr(done.trainer.optimizer, "optimizer", done.trainer.optimizer)
    assert type(inner) is torch.optim.AdamW
