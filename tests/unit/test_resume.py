"""Law 4: a resumed run equals an uninterrupted one, wherever it was cut."""

import shutil

import pytest
import torch

from peftlab.checkpoint import STATE_FILE, last_good_checkpoint
from peftlab.errors import CheckpointError
from peftlab.schedule import PhaseSettings
from peftlab.trainer import LabTrainer
from tiny_runs import STEPS, Finished, run, same

RESET = (
    PhaseSettings(steps=4),
    PhaseSettings(steps=4, groups=("mlp",), moments="reset"),
    PhaseSettings(groups=("attention",), moments="reset"),
)
SETUPS = {
    "both-mlp-attn": {"phases": "both->mlp->attn"},
    "early-late": {"phases": "early->late"},
    "reset": {"phases": RESET},
}
EVERY = {"save_steps": 1, "validation_steps": 3, "keep": STEPS}
SELDOM = EVERY | {"save_steps": STEPS}


def later(events, kind, step):
    """What was told of steps after `step`, without how long it took."""
    return [
        {k: v for k, v in fields.items() if k not in ("seconds", "tokens_per_second")}
        for name, fields in events
        if name == kind and fields["step"] > step
    ]


def assert_equal(resumed: Finished, whole: Finished, step: int) -> None:
    assert same(resumed.tensors, whole.tensors), f"cut after step {step}: other weights"
    assert resumed.log == whole.log, f"cut after step {step}: other gradient rows"
    assert resumed.log.steps == list(range(1, STEPS + 1))
    for kind in ("step", "validated"):
        assert later(resumed.events, kind, step) == later(whole.events, kind, step), (kind, step)
    assert resumed.trainer.num_tokens == whole.trainer.num_tokens
    one, two = resumed.trainer.state, whole.trainer.state
    assert (one.best_global_step, one.best_metric) == (two.best_global_step, two.best_metric)
    first, second = (optimizer_state(r) for r in (resumed, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), f"cut after step {step}: other moments"


def optimizer_state(finished):
    names = {p: name for name, p in finished.trainer.parameters.items()}
    optimizer = getattr(finished.trainer.optimizer, "optimizer", finished.trainer.optimizer)
    return {
        f"{names[p]}|{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """One uninterrupted run of each set-up, with a checkpoint at every step."""
    made = {}
    for name, setup in SETUPS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = (run(folder, **setup, **EVERY), folder)
    return made


@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_that_goes_on_equals_one_that_was_not_cut(setup, step, wholes, tmp_path):
    whole, folder = wholes[setup]
    resumed = run(tmp_path, resume=folder / f"checkpoint-{step}", **SETUPS[setup], **SELDOM)
    assert_equal(resumed, whole, step)
    kind = "phase_started" if any(p.start_step == step for p in phases_of(whole)) else "phase_resumed"
    assert resumed.events[0][0] == kind


def phases_of(finished):
    return finished.trainer.parts.schedule.phases


@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_a_run_that_was_stopped_goes_on(step, wholes, tmp_path):
    """The same through a stop on request, in the run's own folder."""
    whole, _ = wholes["both-mlp-attn"]
    setup = SETUPS["both-mlp-attn"] | SELDOM
    stopped = run(tmp_path, stop_after=step, **setup)
    assert stopped.trainer.state.global_step == step
    good, problems = last_good_checkpoint(tmp_path)
    assert (good, problems) == (tmp_path / f"checkpoint-{step}", [])
    assert_equal(run(tmp_path, resume=good, **setup), whole, step)


def test_cut_twice(wholes, tmp_path):
    whole, folder = wholes["reset"]
    run(tmp_path, resume=folder / "checkpoint-3", stop_after=5, **SETUPS["reset"], **SELDOM)
    twice = run(tmp_path / "b", resume=tmp_path / "checkpoint-5", **SETUPS["reset"], **SELDOM)
    assert_equal(twice, whole, 5)


def test_the_callers_random_state_has_no_say(wholes, tmp_path):
    whole, folder = wholes["early-late"]
    torch.manual_seed(987)
    resumed = run(tmp_path, resume=folder / "checkpoint-7", **SETUPS["early-late"], **SELDOM)
    assert same(resumed.tensors, whole.tensors)


# -- companions: what the check above would catch ---------------------------------------------------------------


def test_companion_dropout_that_is_not_keyed_by_step(wholes, tmp_path, monkeypatch):
    whole, folder = wholes["both-mlp-attn"]
    monkeypatch.setattr("peftlab.trainer.seed_for", lambda seed, *key: seed + len(key))
    resumed = run(tmp_path, resume=folder / "checkpoint-5", **SETUPS["both-mlp-attn"], **SELDOM)
    assert not same(resumed.tensors, whole.tensors)


def test_companion_lost_moments(wholes, tmp_path, monkeypatch):
    whole, folder = wholes["both-mlp-attn"]
    monkeypatch.setattr("peftlab.trainer.load_optimizer", lambda *_: None)
    resumed = run(tmp_path, resume=folder / "checkpoint-5", **SETUPS["both-mlp-attn"], **SELDOM)
    assert not same(resumed.tensors, whole.tensors)


def test_companion_a_learning_rate_one_step_off(wholes, tmp_path, monkeypatch):
    whole, folder = wholes["both-mlp-attn"]
    right = LabTrainer._rates
    monkeypatch.setattr(LabTrainer, "_rates", lambda self, step: right(self, step + 1))
    resumed = run(tmp_path, resume=folder / "checkpoint-10", **SETUPS["both-mlp-attn"], **SELDOM)
    assert not same(resumed.tensors, whole.tensors)


def test_companion_an_order_that_begins_again(wholes, tmp_path, monkeypatch):
    whole, folder = wholes["both-mlp-attn"]
    monkeypatch.setattr("peftlab.batches.EpochOrder.set_epoch", lambda self, epoch: None)
    resumed = run(tmp_path, resume=folder / "checkpoint-8", **SETUPS["both-mlp-attn"], **SELDOM)
    assert not same(resumed.tensors, whole.tensors)


def test_a_checkpoint_of_another_adapter_is_refused(wholes, tmp_path):
    _, folder = wholes["both-mlp-attn"]
    with pytest.raises(CheckpointError, match="the saved adapter does not fit: missing"):
        run(tmp_path, resume=folder / "checkpoint-5", targets="all", **SELDOM)


def test_a_checkpoint_without_an_adapter_is_refused(wholes, tmp_path):
    _, folder = wholes["both-mlp-attn"]
    shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter\.safetensors"):
        run(tmp_path / "again", resume=tmp_path / "checkpoint-5", **SELDOM)
    assert (tmp_path / "checkpoint-5" / STATE_FILE).exists()
