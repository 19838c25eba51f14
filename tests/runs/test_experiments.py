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
from peftlab.run import RunFolder

MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes")
"""What no two runs have alike."""


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
    """What an experiment found, without what is measured and without where it lies."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for runs in found["runs"].values():
        for run in runs:
            for key in (*MEASURED, "folder"):
                del run[key]
    return found


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
    whole = start(tmp_path, config, "whole")
    told, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, told
    first, second = tmp_path / "killed" / "ranks-2", tmp_path / "whole" / "ranks"
    assert numbers(first) == numbers(second)
    assert "no winner is named: 1 seed, from 3 on one may be" in (second / "table.md").read_text(
        encoding="utf-8"
    )
    assert all(metric["winner"] is None for metric in numbers(second)["metrics"].values())
    with (second / "runs.csv").open(encoding="utf-8") as stream:
        assert [line["arm"] for line in csv.DictReader(stream)] == ["rank 2", "rank 4"]
