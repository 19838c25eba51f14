"""Continual learning as a whole: what is shared forgets, what is isolated does not, and a killed experiment goes on."""

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

import pytest

import whole_runs
from peftlab.errors import ConfigError, DataError
from peftlab.experiments.continual import Settings, carry_out
from peftlab.settings import validate

SMALL: dict[str, Any] = {
    "seeds": [1], "eval_samples": 10, "max_new_tokens": 8, "max_length": 32, "validation_rows": 8, "resamples": 100,
    "device": "cpu",
}  # fmt: skip
BRIEF = SMALL | {"plans": ["sequential", "replay"], "steps": 8}
ANSWERS = {"open": "yes it is open today", "shut": "no they never come back"}


def write_tasks(folder: Path) -> dict[str, dict[str, str]]:
    """Two tasks that ask the same and contradict each other, as the setting `configs` takes them."""
    for label, answer in ANSWERS.items():
        (folder / label).mkdir(parents=True)
        for split, numbers in (("train", range(48)), ("validation", range(48, 56)), ("test", range(56, 68))):
            lines = [{"prompt": f"ask {n}:", "completion": answer} for n in numbers]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / label / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return {label: {"name": "jsonl", "data_dir": str(folder / label)} for label in ANSWERS}


def run(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True)
    files = carry_out(validate(Settings, values), folder, lambda text: None)
    assert all(file.is_file() for file in files)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def without_seconds(folder: Path) -> list[str]:
    """The table's lines, but for those of cost, where seconds stand."""
    text = (folder / "table.md").read_text(encoding="utf-8")
    before, _, rest = text.partition("Cost, means over seeds")
    return [*before.splitlines(), *[line for line in rest.splitlines() if line.startswith("- ")]]


@pytest.fixture(scope="module")
def conflict(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("continual")
    values = SMALL | {"methods": "hybrid", "plans": ["isolated", "shared_layer"], "steps": 16}
    return place / "continual", run(place / "continual", values | {"configs": write_tasks(place / "tasks")})


def measure(found: dict[str, Any], arm: str, name: str) -> float:
    return float(found["arms"][arm]["measures"]["bleu"][name]["mean"])


def test_contradicting_tasks_are_forgotten_where_something_is_shared_and_nowhere_else(
    conflict: tuple[Path, dict[str, Any]],
) -> None:
    _, found = conflict
    (rows,) = found["arms"]["hybrid isolated"]["matrices"]["bleu"]
    assert rows[0][0] > 40  # it was learned, so there is something to forget
    assert measure(found, "hybrid isolated", "forgetting") == 0.0
    assert measure(found, "hybrid isolated", "backward transfer") == 0.0
    assert measure(found, "hybrid isolated", "retention") == 1.0
    assert measure(found, "hybrid isolated", "forward transfer") == pytest.approx(0.0, abs=1e-9)
    shared = "hybrid shared layer"
    assert measure(found, shared, "forgetting") > 20
    assert measure(found, shared, "backward transfer") < -20
    assert measure(found, shared, "retention") < 0.7
    assert measure(found, shared, "average") < measure(found, "hybrid isolated", "average")


def test_no_winner_is_named_at_one_seed(conflict: tuple[Path, dict[str, Any]]) -> None:
    _, found = conflict
    assert set(found["verdicts"]) == {"average of bleu", "backward transfer of bleu"}
    for verdict in found["verdicts"].values():
        assert verdict["winner"] is None
        assert "from 3 on" in verdict["withheld"]
    assert any("no winner is named" in sentence for sentence in found["answer"])
    assert any("forgetting is exactly 0" in sentence for sentence in found["answer"])


def test_table_matrix_charts_and_page_say_the_same(conflict: tuple[Path, dict[str, Any]]) -> None:
    folder, found = conflict
    with (folder / "matrix.csv").open(encoding="utf-8", newline="") as stream:
        cells = [row for row in csv.DictReader(stream) if row["metric"] == "bleu"]
    assert len(cells) == 2 + 2 * 2 * 2
    for arm, facts in found["arms"].items():
        own = [float(row["score"]) for row in cells if row["arm"] == arm]
        assert own == [score for stage in facts["matrices"]["bleu"][0] for score in stage]
    table = (folder / "table.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for arm in found["arms"]:
        told = f"{measure(found, arm, 'average'):.2f}"
        assert told in table
        assert told in page
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert (folder / "matrix.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_killed_experiment_goes_on_to_the_same_table(tmp_path: Path) -> None:
    asked = BRIEF | {"configs": write_tasks(tmp_path / "tasks")}
    whole = tmp_path / "whole" / "continual"
    found = run(whole, asked)
    assert measure(found, "lora sequential", "forgetting") > 10  # one adapter for both: it must forget
    assert measure(found, "lora sequential", "backward transfer") < -10
    output = tmp_path / "killed"
    given = [arg for key, value in asked.items() for arg in ("--set", f"{key}={json.dumps(value)}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "peftlab", "experiment", "continual", "--output", str(output), *given],
        env=whole_runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    killed = False
    while time.monotonic() < deadline and process.poll() is None and not killed:
        if list(
            output.glob("runs/lora-replay-seed1-*/stage-1/training")
        ):  # the first arm is over, the second begun
            os.kill(process.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    told, _ = process.communicate(timeout=200)
    assert killed, told
    kept = {
        path: path.stat().st_mtime_ns for path in output.glob("runs/lora-sequential-*/**/evaluation.json")
    }
    assert len(kept) == 4
    again = output / "continual-2"
    run(again, asked)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # none was computed again
    assert (again / "matrix.csv").read_bytes() == (whole / "matrix.csv").read_bytes()
    assert (again / "matrix.png").read_bytes() == (whole / "matrix.png").read_bytes()
    assert without_seconds(again) == without_seconds(whole)


def test_what_is_asked_wrongly_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    for values, kind, message in (
        ({"tasks": ["praise"]}, ConfigError, r"two tasks or more"),
        ({"configs": {"a": {"name": "embedded"}}, "tasks": ["b"]}, ConfigError, r"tasks names b"),
        ({"code": str(tmp_path), "tasks": ["ruby"]}, ConfigError, r"no functions in ruby"),
        ({"code": str(tmp_path), "tasks": []}, DataError, r"holds no python functions"),
        ({"metric": "accuracy"}, ConfigError, r"scored by accuracy"),
    ):
        folder = tmp_path / "x" / str(len(list(tmp_path.rglob("*"))))
        folder.mkdir(parents=True)
        with pytest.raises(kind, match=message):
            carry_out(
                validate(Settings, SMALL | {"tasks": ["praise", "denial"], "max_length": 192} | values),
                folder,
                lambda text: None,
            )
        assert not list(folder.parent.glob("runs/*/stage-*"))
