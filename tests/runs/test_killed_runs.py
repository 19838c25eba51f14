"""Law 4: a run killed at any moment and resumed ends as the uninterrupted one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import whole_runs
from peftlab.config import build_config
from peftlab.execute import execute
from peftlab.run import RunFolder
from peftlab.trainer import LabTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(place: Path) -> RunFolder:
    """The run that nobody disturbed."""
    values = whole_runs.make_values(
        place, output={"directory": str(place / "whole")}, training={"save_steps": 1}
    )
    return execute(build_config(values), show=lambda line: None)


def stop_in_phase_two(place: Path, name: str, number: int) -> tuple[RunFolder, int]:
    """Start the same run in its own process and send it a signal in its second phase."""
    values = whole_runs.make_values(
        place, output={"directory": str(place / name)}, training={"save_steps": 1}
    )
    config = build_config(values)
    (place / name).mkdir()
    config.save(place / name / "asked.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "peftlab", "run", str(place / name / "asked.yaml")],
        env=whole_runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    run = None
    while time.monotonic() < deadline and process.poll() is None:
        folders = [p for p in (place / name).iterdir() if p.is_dir()]
        if folders and (folders[0] / "checkpoints" / "checkpoint-6").exists():
            run = RunFolder(folders[0])
            os.kill(process.pid, number)
            break
        time.sleep(0.002)
    _, messages = process.communicate(timeout=200)
    assert run is not None, messages
    return run, process.returncode


def same_end(one: RunFolder, two: RunFolder) -> None:
    """Same weights, same scores, same gradient rows."""
    first, second = (load_file(r.path / "final_model" / "adapter_model.safetensors") for r in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for file in ("gradient_analysis.group_norms.csv", "gradient_analysis.layer_norms.csv"):
        assert (one.path / file).read_text() == (two.path / file).read_text()
    assert one.summary()["scores"] == two.summary()["scores"]
    assert one.summary()["best_checkpoint"] == two.summary()["best_checkpoint"]
    assert one.summary()["phases"] == two.summary()["phases"]
    assert one.summary()["steps"] == two.summary()["steps"]
    losses = [[(e["step"], e["loss"]) for e in run.timeline() if e["event"] == "step"] for run in (one, two)]
    assert losses[0] == losses[1]


def test_killed_in_phase_two(place: Path, whole: RunFolder) -> None:
    run, code = stop_in_phase_two(place, "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not run.is_finished
    execute(build_config({}), resume=run.path, show=lambda line: None)
    assert run.is_finished
    assert [e["event"] for e in run.events()].count("resumed") == 1
    same_end(whole, run)


def test_terminated_saves_and_says_how_to_go_on(place: Path, whole: RunFolder) -> None:
    run, code = stop_in_phase_two(place, "terminated", signal.SIGTERM)
    assert code == 75
    done = whole_runs.peftlab("run", "--resume", str(run.path), folder=place)
    assert done.returncode == 0, done.stderr
    same_end(whole, run)


def test_a_damaged_last_checkpoint_is_left_out(place: Path, whole: RunFolder) -> None:
    run, _ = stop_in_phase_two(place, "damaged", signal.SIGKILL)
    newest = max(run.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    file = newest / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    execute(build_config({}), resume=run.path, show=said.append)
    assert any("damaged" in line for line in said)
    same_end(whole, run)


def test_a_finished_run_is_not_trained_again(whole: RunFolder) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole.checkpoints).rglob("*") if p.is_file()}
    weights = load_file(whole.path / "final_model" / "adapter_model.safetensors")
    record = {
        name: (whole.path / name).read_bytes()
        for name in ("events.jsonl", "report.html", "results_summary.json")
    }
    said: list[str] = []
    execute(build_config({}), resume=whole.path, show=said.append)
    assert said == [f"already finished: {whole.path}"]
    assert record == {name: (whole.path / name).read_bytes() for name in record}
    after = {p: p.stat().st_mtime_ns for p in (whole.checkpoints).rglob("*") if p.is_file()}
    assert before == after
    again = load_file(whole.path / "final_model" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def unrecord(run: RunFolder, place: Path, name: str) -> RunFolder:
    """A copy of a finished run as a kill between its last checkpoint and its record would leave it."""
    copy = place / name
    shutil.copytree(run.path, copy)
    for file in (
        "checkpoints/finished.json",
        "results_summary.json",
        "predictions.after.jsonl",
        "report.html",
        "DONE",
    ):
        (copy / file).unlink()
    for pattern in ("gradient_analysis.*", "*_evaluation.json"):
        for path in copy.glob(pattern):
            path.unlink()
    shutil.rmtree(copy / "final_model")
    return RunFolder(copy)


def test_killed_after_the_last_checkpoint_trains_no_further(place: Path, whole: RunFolder) -> None:
    run = unrecord(whole, place, "unrecorded")
    execute(build_config({}), resume=run.path, show=lambda line: None)
    same_end(whole, run)
    assert not (run.checkpoints / "checkpoint-13").exists()


def rising(trainer: LabTrainer, *_: Any, **__: Any) -> dict[str, float]:
    """A validation loss that only rises, in place of the real one."""
    metrics = {"eval_loss": float(trainer.state.global_step)}
    trainer.log(dict(metrics))
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    return metrics


def test_an_early_stop_is_remembered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabTrainer, "evaluate", rising)
    training = {
        "max_steps": 12, "validation_steps": 1, "save_steps": 1, "early_stopping_patience": 3, "select_best": False,
        "keep_checkpoints": 20,
    }  # fmt: skip
    values = whole_runs.make_values(
        place, training=training, schedule={"strategy": None}, output={"directory": str(place / "early")}
    )
    stopped = execute(build_config(values), show=lambda line: None)
    assert stopped.summary()["stopped_early"]
    assert stopped.summary()["steps"] == 4
    again = unrecord(stopped, place, "early-unrecorded")
    execute(build_config({}), resume=again.path, show=lambda line: None)
    assert again.summary()["stopped_early"]
    same_end(stopped, again)
