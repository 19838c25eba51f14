"""AdaLoRA: ranks are really taken, as peft's own allocator would, also across a resume."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from peftlab.catalog import METHODS
from peftlab.errors import CheckpointError, ConfigError, ScheduleError
from peftlab.mapping import map_model
from peftlab.methods import adalora
from peftlab.settings import validate
from peftlab.trainer import LabTrainer
from tiny_runs import ONE_PHASE, make_rows, prepare, run, same

SETTINGS = {"initial_rank": 6, "target_rank": 2, "alpha": 6, "dropout": 0.1, "interval_steps": 2}
FIXED = {"initial_rank": 6, "alpha": 6, "dropout": 0.1, "adaptive_rank": False}
STEPS = 24
ADALORA = {
    "method": "adalora", "settings": SETTINGS, "phases": ONE_PHASE, "max_steps": STEPS, "validation_steps": STEPS,
    "save_steps": STEPS,
}  # fmt: skip


def ranks(done):
    return list(done.attachment.ranks().values())


def test_the_budget_is_reached_and_given_unevenly(tmp_path):
    done = run(tmp_path / "one", **ADALORA)
    found = ranks(done)
    assert sum(found) == 2 * len(found) == 2 * 14
    assert len(set(found)) > 1
    by = {}
    for ranking in ("magnitude", "uniform"):
        by[ranking] = ranks(
            run(tmp_path / ranking, **ADALORA | {"settings": SETTINGS | {"rank_allocation": ranking}})
        )
        assert sum(by[ranking]) == sum(found)
    assert set(by["uniform"]) == {2}
    assert by["magnitude"] != found


def test_only_an_adapter_within_its_budget_is_chosen(tmp_path):
    done = run(tmp_path, **ADALORA | {"validation_steps": 1})
    assert done.trainer.state.best_global_step >= STEPS - 7
    losses = {told["step"]: told["validation_loss"] for told in done.told("validated")}
    best = min((step for step in losses if step >= STEPS - 7), key=losses.__getitem__)
    assert best == done.trainer.state.best_global_step
    plain = run(tmp_path, **ADALORA | {"validation_steps": 1, "settings": SETTINGS | {"orthogonality": 0.0}})
    first = {told["step"]: told["validation_loss"] for told in plain.told("validated")}[1]
    assert losses[1] == pytest.approx(first), "the validation loss has no orthogonality term in it"


def test_the_three_rankings_train_different_adapters(tmp_path):
    """On the same rows from the same start: ranks and weights differ, and so does what the model says."""
    kinds = ("importance", "magnitude", "uniform")
    done = {
        kind: run(tmp_path / kind, **ADALORA | {"settings": SETTINGS | {"rank_allocation": kind}})
        for kind in kinds
    }
    losses = [done[kind].told("validated")[-1]["validation_loss"] for kind in kinds]
    assert len({round(loss, 4) for loss in losses}) == 3, losses
    logs = [done[kind].attachment.probes()["ranks"].log for kind in kinds]
    assert logs[0].ranks != logs[1].ranks != logs[2].ranks != logs[0].ranks
    assert all(log.steps == logs[0].steps and log.budgets == logs[0].budgets for log in logs)


@pytest.mark.parametrize("ranking", ["importance", "magnitude", "uniform"])
def test_without_adaptive_rank_it_is_a_fixed_rank(ranking, tmp_path):
    """Bit-equal to a budget that never falls, whatever would be ranked."""
    ranked = SETTINGS | {"rank_allocation": ranking}
    done = run(tmp_path / "not", **ADALORA | {"settings": FIXED})
    assert set(ranks(done)) == {6}
    level = run(tmp_path / "level", **ADALORA | {"settings": ranked | {"target_rank": 6}})
    own, other = done.attachment.parameters(), level.attachment.parameters()
    assert all(torch.equal(own[name], other[name]) for name in own)
    for one in (done, level):
        log = one.attachment.probes()["ranks"].log
        assert (log.steps, set(log.budgets), set(log.totals())) == ([0, STEPS], {6 * 14}, {6 * 14})


@pytest.mark.parametrize("adaptive", [True, False])
def test_it_is_what_peft_does_by_hand(adaptive, tmp_path):
    """The same rows, stepped by hand with peft's own allocator (or without it), end in the same weights."""
    settings = (SETTINGS if adaptive else FIXED) | {"dropout": 0.0}
    whole = ADALORA | {"settings": settings, "clip_norm": 0, "accumulation_steps": 1}
    done = prepare(tmp_path, **whole)
    start = {n: t.clone() for n, t in done.tensors.items()}
    order = [done.trainer.order.rows_of_step(step) for step in range(STEPS)]
    done.trainer.train()

    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=6, total_step=STEPS, tinit=2, tfinal=7, deltaT=2, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    peft.set_peft_model_state_dict(model, start)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    rows = make_rows("causal")
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = done.watcher.learning_rates[step]
        batch = done.trainer.parts.collator([rows[i] for i in order[step]])
        model(**batch).loss.backward()
        optimizer.step()
        if adaptive:
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    by_hand = dict(model.named_parameters())
    for name, parameter in done.attachment.parameters().items():
        torch.testing.assert_close(parameter, by_hand[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("step", [3, 9, 18])
def test_a_resumed_run_allocates_alike(step, tmp_path):
    every = ADALORA | {"save_steps": 1, "keep": STEPS}
    whole = run(tmp_path / "whole", **every)
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / f"checkpoint-{step}", **ADALORA)
    assert same(resumed.tensors, whole.tensors)
    assert ranks(resumed) == ranks(whole)


def test_what_the_ranks_have_been_is_recorded(tmp_path):
    """After each allocation as `ranks` says, and not while taken ranks come back to life between two of them."""
    done = prepare(tmp_path, **ADALORA | {"settings": SETTINGS | {"interval_steps": 5}})
    seen, kept = {}, done.attachment.after_step

    def watch(step):
        kept(step)
        seen[step] = done.attachment.ranks()

    done.attachment.after_step = watch
    done.trainer.train()
    log = done.attachment.probes()["ranks"].log
    assert log.steps == [0, 5, 10, 15, 17, 24]
    assert {values[0] for values in log.ranks.values()} == {6}, "what training begins with"
    for row, step in list(enumerate(log.steps))[1:]:
        assert {path: values[row] for path, values in log.ranks.items()} == seen[step]
    assert log.totals() == log.budgets == [84, 56, 33, 28, 28, 28]
    assert sum(seen[11].values()) > sum(seen[10].values())
    assert log.places["model.layers.1.mlp.down_proj"].layer == 1
    LabTrainer(done.trainer.parts, done.trainer.args)
    assert done.attachment.probes()["ranks"].log.steps == [0], (
        "a training of its own begins a record of its own"
    )


def test_companion_an_allocator_that_forgets(tmp_path, monkeypatch):
    every = ADALORA | {"save_steps": 1, "keep": STEPS}
    whole = run(tmp_path / "whole", **every)
    kept = LabTrainer._load_from_checkpoint

    def forget(self, *given, **more):
        kept(self, *given, **more)
        self.parts.attachment._tuner.rankallocator.reset_ipt()

    monkeypatch.setattr(LabTrainer, "_load_from_checkpoint", forget)
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-9", **ADALORA)
    assert not same(resumed.tensors, whole.tensors)


def test_saved_with_the_ranks_that_are_kept(tmp_path: Path):
    done = run(tmp_path / "run", **ADALORA)
    done.attachment.model.eval()
    folder = tmp_path / "saved"
    done.attachment.save(folder)
    sizes = {
        n: t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_E" in n
    }
    assert sorted(sizes.values()) == sorted(ranks(done))
    assert json.loads((folder / "adapter_config.json").read_text())["total_step"] == STEPS
    batch = tiny_models.inputs("llama")
    with torch.no_grad():
        expected = done.attachment.model(**batch).logits
        with (
            warnings.catch_warnings()
        ):  # peft 0.21 warns of the very pattern that it wrote, and of empty tensors
            warnings.simplefilter("ignore")
            by_peft = peft.PeftModel.from_pretrained(tiny_models.build("llama"), str(folder)).eval()
        torch.testing.assert_close(by_peft(**batch).logits, expected)
        base = tiny_models.build("llama")
        leaf = METHODS.load("adalora")
        again = leaf.attach(base, map_model(base), leaf.Settings(**SETTINGS), head="causal", seed=5)
        again.load_saved(folder)
        again.model.eval()
        torch.testing.assert_close(again.model(**batch).logits, expected)
    assert list(again.ranks().values()) == ranks(done)
    assert same(done.tensors, done.attachment.tensors()), "saving changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divisor_of_the_ranks_does_not_train(dtype):
    base = tiny_models.build("llama").to(dtype)
    leaf = METHODS.load("adalora")
    attached = leaf.attach(base, map_model(base), leaf.Settings(**SETTINGS), head="causal", seed=5)
    trained = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    assert trained == set(attached.parameters())
    assert not any("ranknum" in name for name in trained)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match="3 phases leave some of them without gradients"):
        prepare(tmp_path, **ADALORA | {"phases": "both->mlp->attn"})
    with pytest.raises(ScheduleError, match="a run of 2 steps leaves 1"):
        prepare(tmp_path, **ADALORA | {"max_steps": 2, "validation_steps": 1, "save_steps": 1})
    with pytest.raises(ConfigError, match="target_rank 9 is above initial_rank 6"):
        validate(METHODS.load("adalora").Settings, {"initial_rank": 6, "target_rank": 9})
    done = run(tmp_path, **ADALORA)
    tensors = done.tensors
    key = next(n for n in tensors if n.startswith("allocator.kept."))
    with pytest.raises(CheckpointError, match=r"unexpected allocator\.kept"):
        done.attachment.load(tensors | {key: torch.ones(9, dtype=torch.bool)})


def test_settings_of_how_ranks_are_taken_need_ranks_that_are_taken():
    for given in (
        {"target_rank": 4},
        {"warmup_share": 0.5},
        {"interval_steps": 3},
        {"rank_allocation": "magnitude"},
    ):
        with pytest.raises(ConfigError, match=rf"{next(iter(given))}: no effect with adaptive_rank=false"):
            validate(adalora.Settings, {"adaptive_rank": False} | given, where="method")
    fixed = validate(adalora.Settings, {"adaptive_rank": False, "initial_rank": 4}, where="method")
    assert validate(adalora.Settings, fixed.model_dump(), where="method") == fixed, (
        "as a run's own config has it"
    )
