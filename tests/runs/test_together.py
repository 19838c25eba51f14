"""Runs that are carried out together leave what each leaves alone; what cannot be is refused by name before any work."""

from __future__ import annotations

import json
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

import peftlab
import whole_runs
from peftlab.config import RunConfig, build_config
from peftlab.errors import ConfigError, InputError, MethodError, RunError
from peftlab.execute import execute
from peftlab.run import RunFolder
from peftlab.together import resume_together, run_together

CLOSE = 1e-5
RUNS: dict[str, dict[str, Any]] = {
    "small": {"rank": 2, "training": {"seed": 1, "accumulation_steps": 2}},
    "short": {"rank": 4, "targets": "attention", "use_rslora": True, "training": {"seed": 2, "max_steps": 7}},
    "phased": {
        "rank": 3, "optimizer": "lora_plus", "schedule": {"strategy": "both->mlp->attn"},
        "training": {"learning_rate": 5e-4},  # B learns 16 times as fast
    },
}  # fmt: skip


def config(place: Path, folder: str, **changes: Any) -> RunConfig:
    """One run; what is neither training nor another section is the method's."""
    training = {"max_steps": 10, "batch_size": 2, "layout": "padded", "save_steps": 1, "keep_checkpoints": 20}
    sections = {
        "training": training,
        "schedule": {"strategy": None},
        "evaluation": {"num_samples": 2, "max_new_tokens": 2},
    }
    method = {"name": "lora", "rank": 4, "dropout": 0.1}
    for key, value in changes.items():
        if isinstance(value, dict):
            sections[key] = sections.get(key, {}) | value
        else:
            method[key] = value
    return build_config(
        whole_runs.make_values(place, method=method, output={"directory": str(place / folder)}, **sections)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def alone(place: Path) -> list[RunFolder]:
    return [execute(config(place, "alone", **own), show=lambda line: None) for own in RUNS.values()]


@pytest.fixture(scope="module")
def joint(place: Path) -> list[RunFolder]:
    said: list[str] = []
    runs = peftlab.run_together([config(place, "joint", **own) for own in RUNS.values()], show=said.append)
    assert sum(line.startswith("report: ") for line in said) == len(RUNS)
    return runs


def same_end(one: RunFolder, other: RunFolder) -> None:
    """Same weights, losses, scores and phases."""
    first, second = (
        load_file(run.path / "final_model" / "adapter_model.safetensors") for run in (one, other)
    )
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=CLOSE, msg=name)
    for run in (one, other):
        assert run.is_finished
    for key in ("scores", "phases", "steps", "counts", "base_unchanged", "stopped_early"):
        assert one.summary()[key] == other.summary()[key]
    losses = [
        [(e["step"], e["tokens"], e["phase"]) for e in run.timeline() if e["event"] == "step"]
        for run in (one, other)
    ]
    assert losses[0] == losses[1]
    found = [[e["loss"] for e in run.timeline() if e["event"] == "step"] for run in (one, other)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_each_ends_as_it_ends_alone_and_leaves_the_same_files(
    joint: list[RunFolder], alone: list[RunFolder]
) -> None:
    for one, other in zip(joint, alone, strict=True):
        same_end(one, other)
        assert one.name == other.name  # the fingerprint is in it
        files = [
            {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file()}
            for run in (one, other)
        ]
        assert files[0] == files[1]
        configs = [dict(run.config) for run in (one, other)]
        for values in configs:
            values.pop("output")
        assert configs[0] == configs[1]
        gradients = [(run.path / RunFolder.GRADIENTS).read_text().splitlines() for run in (one, other)]
        assert gradients[0][0] == gradients[1][0]
        assert len(gradients[0]) == len(gradients[1])


def test_a_run_says_whose_company_it_had(joint: list[RunFolder]) -> None:
    for run in joint:
        (event,) = [e for e in run.timeline() if e["event"] == "trained_together"]
        assert event["others"] == [other.name for other in joint if other is not run]
        started = [e for e in run.timeline() if e["event"] == "phase_started"]
        assert all("share the blocks below" in e["trunk"] for e in started)
        assert any("hidden states" in note for note in run.preflight["notes"])


def cut(run: RunFolder, place: Path, folder: str, step: int) -> RunFolder:
    """A copy of a finished run as a kill after a step would leave it."""
    copy = place / folder / run.name
    shutil.copytree(run.path, copy)
    for file in ("results_summary.json", "predictions.after.jsonl", "report.html", "DONE"):
        (copy / file).unlink()
    (copy / "checkpoints" / "finished.json").unlink()
    for path in [*copy.glob("gradient_analysis.*"), copy / "final_model", copy / "plots"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    evaluation = next(copy.glob("*_evaluation.json"))
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"after": None}))
    for path in (copy / "checkpoints").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return RunFolder(copy)


def test_stopped_at_different_steps_they_go_on_together_or_alone(
    place: Path, joint: list[RunFolder], alone: list[RunFolder]
) -> None:
    stopped = [cut(run, place, "stopped", step) for run, step in zip(joint, (4, 6, 3), strict=True)]
    by_itself = cut(joint[0], place, "by itself", 4)
    done = resume_together([run.path for run in stopped], show=lambda line: None)
    for one, other in zip(done, alone, strict=True):
        same_end(one, other)
    execute(build_config({}), resume=by_itself.path, show=lambda line: None)
    same_end(by_itself, alone[0])
    said: list[str] = []
    resume_together([run.path for run in stopped], show=said.append)
    assert said == [f"already finished: {run.path}" for run in stopped]


@pytest.mark.skipif(os.environ.get("PEFTLAB_LONG") != "1", reason="two processes; PEFTLAB_LONG=1 runs it")
def test_a_signal_stops_all_and_the_command_goes_on(place: Path, alone: list[RunFolder]) -> None:
    files = []
    for name in ("small", "short"):
        files.append(place / f"{name}.yaml")
        config(place, "signalled", **RUNS[name]).save(files[-1])
    command = [sys.executable, "-m", "peftlab", "together", *map(str, files)]
    process = subprocess.Popen(
        command, env=whole_runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if list((place / "signalled").glob("*/checkpoints/checkpoint-2")):
            os.kill(process.pid, signal.SIGTERM)
            break
        time.sleep(0.002)
    _, messages = process.communicate(timeout=200)
    assert process.returncode == 75, messages
    assert "go on with peftlab together --resume" in messages
    found = {run.config["training"]["seed"]: run for run in RunFolder.all_in(place / "signalled")}
    assert not any(run.is_finished for run in found.values())
    done = whole_runs.peftlab(
        "together", "--resume", *(str(run.path) for run in found.values()), folder=place
    )
    assert done.returncode == 0, done.stderr
    for other in alone[:2]:
        same_end(found[other.config["training"]["seed"]], other)


def test_a_run_that_fails_leaves_the_others_finished(place: Path, alone: list[RunFolder]) -> None:
    bad = {"rank": 4, "training": {"seed": 7, "learning_rate": 1e30, "warmup_steps": 0}}
    with pytest.raises(RunError, match=r"1 of 2 runs failed: bad: NonFiniteError: step .*; good trained to"):
        run_together(
            [config(place, "failed", **RUNS["small"]), config(place, "failed", **bad)],
            names=["good", "bad"],
            show=lambda line: None,
        )
    runs = RunFolder.all_in(place / "failed")
    finished = [run for run in runs if run.is_finished]
    assert len(runs) == 2
    same_end(finished[0], alone[0])
    (failed,) = [run for run in runs if not run.is_finished]
    assert [e["event"] for e in failed.timeline()][-1] == "run_failed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"max_length": 150}}, r"odd: task\.max_length is 150, and 160 in plain"),
        ({"model": {"dtype": "bfloat16"}}, r"odd: model\.dtype is 'bfloat16', and 'auto' in plain"),
        ({"training": {"layout": "packed"}}, r"odd: training\.layout is 'packed', and 'padded' in plain"),
        (
            {"model": {"gradient_checkpointing": True}},
            r"odd: model\.gradient_checkpointing: dropout would be",
        ),
        ({"training": {"auto_batch_size": True}}, r"odd: training\.auto_batch_size: what fits is predicted"),
        ({"training": {"trackers": ["tensorboard"]}}, r"odd: training\.trackers: trackers keep one run"),
        ({"bias": "all"}, r"run 'odd' cannot share the base with others: bias=all"),
        ({"init": "pissa"}, r"run 'odd' cannot share the base with others: init=pissa"),
    ],
)
def test_what_cannot_be_joined_is_refused_before_any_work(
    changes: dict[str, Any], words: str, place: Path
) -> None:
    configs = [config(place, "refused"), config(place, "refused", **changes)]
    with pytest.raises((ConfigError, MethodError), match=words):
        run_together(configs, names=["plain", "odd"], show=lambda line: None)
    assert not list((place / "refused").glob("*"))


def test_another_method_and_one_run_are_refused(place: Path) -> None:
    plain = config(place, "refused")
    other = build_config(plain.model_dump(mode="json") | {"adapters": [{"method": "ia3"}]})
    with pytest.raises(ConfigError, match=r"config 2: adapters\[0\]\.method: the method is ia3"):
        run_together([plain, other], show=lambda line: None)
    with pytest.raises(ConfigError, match=r"1 run given; two or more"):
        run_together([plain], show=lambda line: None)
    with pytest.raises(ConfigError, match=r"2 configs need 2 different names"):
        run_together([plain, plain], names=["same", "same"], show=lambda line: None)


def test_a_classifier_is_refused(place: Path, tmp_path: Path) -> None:
    whole_runs.save_byte_model(tmp_path / "bert", "bert")
    rows = tmp_path / "data"
    rows.mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": f"{split} {i} is good", "label": "yn"[i % 2]}) for i in range(6)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    task = {"name": "jsonl", "data_dir": str(rows), "max_length": 40}
    configs = [
        config(place, "refused", model={"name": str(tmp_path / "bert")}, task=task, training={"seed": seed})
        for seed in (1, 2)
    ]
    with pytest.raises(InputError, match=r"classification model cannot share the base"):
        run_together(configs, show=lambda line: None)
