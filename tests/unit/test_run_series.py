"""Runs of an experiment: read where they are finished, gone on with where they were killed, else carried out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from peftlab import run_series
from peftlab.config import build_config
from peftlab.errors import RunError
from peftlab.run import RunFolder
from peftlab.run_series import carry_out_run, choose_lowest, edge_note, rate_rows, render_markdown


def write_finished(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    summary = {
        "best_checkpoint": {"validation_loss": 0.5},
        "counts": {"trainable_parameters": 3, "total_parameters": 9},
        "steps": 2, "seconds": {"train": 1.5}, "tokens_per_second": 7.0, "peak_memory_bytes": {"cpu": 11},
    }  # fmt: skip
    (path / RunFolder.CONFIG).write_text("training: {}\n")
    (path / RunFolder.SUMMARY).write_text(json.dumps(summary))
    (path / RunFolder.ENVIRONMENT).write_text(json.dumps({"versions": {"torch": "x"}}))
    (path / RunFolder.DONE).touch()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each `peftlab run`; it finishes, but where its name begins with "bad"."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[command.index("run") + 1 :])
        name = Path(command[-1]).name.removesuffix(".yaml")
        if name.startswith("bad"):
            return subprocess.CompletedProcess(command, 1, "", "first\nwhat went wrong\n")
        write_finished(Path(command[-1]).parents[1] / "runs" / name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(run_series.subprocess, "run", run)
    return asked


def test_a_run_is_carried_out_once_and_gone_on_with(commands: list[list[str]], tmp_path: Path) -> None:
    config = build_config({"output": {"directory": str(tmp_path / "runs"), "name": "one"}})
    first = carry_out_run(config, tmp_path / "configs")
    assert commands == [[str(tmp_path / "configs" / f"{config.run_name()}.yaml")]]
    assert (first["validation_loss"], first["metrics"], first["seconds"]) == (0.5, {}, 1.5)
    assert carry_out_run(config, tmp_path / "configs") == first
    assert len(commands) == 1, "what is finished is not done again"
    path = tmp_path / "runs" / config.run_name()
    (path / RunFolder.DONE).unlink()
    carry_out_run(config, tmp_path / "configs")
    assert commands[1] == ["--resume", str(path)]


def test_a_failed_run_says_what_went_wrong(commands: list[list[str]], tmp_path: Path) -> None:
    config = build_config({"output": {"directory": str(tmp_path / "runs"), "name": "bad"}})
    with pytest.raises(RunError, match=r"exit code 1\): what went wrong; .*--set runs="):
        carry_out_run(config, tmp_path / "configs")


def test_the_lowest_loss_is_chosen_and_an_edge_is_told() -> None:
    runs = [
        {"learning_rate": rate, "validation_loss": loss}
        for rate, loss in ((1e-3, 0.9), (1e-2, 0.5), (0.1, 0.5))
    ]
    assert choose_lowest(runs) is runs[1], "the first of equals"
    assert choose_lowest([]) is None
    assert [row[3] for row in rate_rows({"a": runs})] == ["chosen", "", "yes", ""]
    assert edge_note({"a": runs}) == []
    assert "better beyond: a" in edge_note({"a": runs[1:] + runs[:1]})[0]
    assert edge_note({"a": runs[1:]}) == [], "of two rates both are edges"


def test_a_bar_in_a_cell_is_no_new_cell() -> None:
    assert render_markdown([["a"], ["b|c"]]).splitlines()[-1] == "| b\\|c |"
