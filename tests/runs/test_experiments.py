"""Experiments as a person starts them: small, killed in the middle and gone on with, and no winner at one seed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import whole_runs
from peftlab.config import OutputSettings, build_config
from peftlab.execute import execute
from peftlab.run import RunFolder
from peftlab.run_series import read_run


def start(place: Path, config: Path, name: str) -> subprocess.Popen[str]:
    """Start the comparison of two ranks."""
    command = [
        sys.executable, "-m", "peftlab", "experiment", "ranks", str(config), "--seeds", "1", "--set", "ranks=[2, 4]",
        "--output", str(place / name),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=whole_runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def kill_at_second_run(process: subprocess.Popen[str], runs: Path) -> None:
    """Kill everything once the first run has finished and the second has begun."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        folders = [RunFolder(path) for path in runs.iterdir()] if runs.is_dir() else []
        if len(folders) > 1 and any(run.is_finished for run in folders):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def numbers(folder: Path) -> dict[str, Any]:
    """What an experiment found."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def carry_out_alone(place: Path, name: str) -> dict[str, Any]:
    """What a run of an experiment comes to where nobody disturbs it."""
    asked = build_config(RunFolder(place / "killed" / "runs" / name).config)
    elsewhere = asked.model_copy(update={"output": OutputSettings(directory=place / "alone")})
    return read_run(execute(elsewhere, show=lambda line: None), elsewhere)


def test_an_experiment_that_was_killed_goes_on_to_the_same_table(tmp_path: Path) -> None:
    values = whole_runs.make_values(tmp_path, schedule={}, evaluation={"num_samples": 4})
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    killed = start(tmp_path, config, "killed")
    kill_at_second_run(killed, tmp_path / "killed" / "runs")
    again = start(tmp_path, config, "killed")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "1/2 rank 2, seed 1: was there" in said
    found = numbers(tmp_path / "killed" / "ranks-2")
    for arm, runs in found["runs"].items():
        undisturbed = carry_out_alone(tmp_path, runs[0]["run"])
        assert undisturbed["validation_loss"] == runs[0]["validation_loss"]
        values = {name: score["value"] for name, score in undisturbed["metrics"].items()}
        assert values == {name: metric["values"][arm][0] for name, metric in found["metrics"].items()}
    folder = tmp_path / "killed" / "ranks-2"
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "no winner is named: 1 seed, from 3 on one may be" in table
    assert all(metric["winner"] is None for metric in found["metrics"].values())
    with (folder / "runs.csv").open(encoding="utf-8") as stream:
        assert [line["arm"] for line in csv.DictReader(stream)] == ["rank 2", "rank 4"]
