"""Runs of an experiment: read where they are finished, gone on with where they were killed, else carried out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from peftlab import run_series
from peftlab.config import build_config
from peftlab.errors import RunError
from peftlab.run import RunFolder
from peftlab.run_series import (
    carry_out_run,
    carry_out_together,
    choose_lowest,
    edge_note,
    rate_rows,
    render_markdown,
)


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


def folder_of(command: list[str]) -> Path:
    return Path(command[-1]).parents[1] / "runs" / Path(command[-1]).name.removesuffix(".yaml")


def write_begun(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / RunFolder.CONFIG).write_text("training: {}\n")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each `peftlab run`; it finishes, but where its name begins with "bad"."""
    asked: list[list[str]] = []

    class Stand:
        """Stands in for a process."""

        def __init__(self, command: list[str]) -> None:
            self.command, self.looks = command, 3
            asked.append(command[command.index("run") + 1 :])

        def goes_on(self, seconds: float) -> bool:
            self.looks -= 1
            write_begun(folder_of(self.command))
            return self.looks > 0

        def end(self) -> None:
            asked.append(["ended"])

        def wait(self) -> tuple[int, str]:
            if folder_of(self.command).name.startswith("bad"):
                return 1, "first\nwhat went wrong\n"
            write_finished(folder_of(self.command))
            return 0, ""

    monkeypatch.setattr(run_series, "_Process", Stand)
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


def test_a_run_that_is_given_up_is_ended_and_can_be_gone_on_with(
    commands: list[list[str]], tmp_path: Path
) -> None:
    config = build_config({"output": {"directory": str(tmp_path / "runs"), "name": "one"}})
    assert carry_out_run(config, tmp_path / "configs", give_up=lambda run: True) == {}
    assert commands[1:] == [["ended"]]
    assert carry_out_run(config, tmp_path / "configs", give_up=lambda run: False)["steps"] == 2
    assert commands[2][0] == "--resume"


def test_words_of_a_real_process_are_kept_and_it_can_be_ended() -> None:
    loud = run_series._Process([sys.executable, "-c", "import sys; print('x' * 200_000); sys.exit('why')"])
    assert loud.wait() == (1, "why")
    slow = run_series._Process([sys.executable, "-c", "import time; time.sleep(60)"])
    assert slow.goes_on(0.01)
    slow.end()
    assert not slow.goes_on(0.01)


def test_a_run_killed_before_its_config_was_written_begins_anew(
    commands: list[list[str]], tmp_path: Path
) -> None:
    config = build_config({"output": {"directory": str(tmp_path / "runs"), "name": "one"}})
    path = tmp_path / "runs" / config.run_name()
    path.mkdir(parents=True)
    (path / RunFolder.EVENTS).touch()
    carry_out_run(config, tmp_path / "configs")
    assert commands[0][0].endswith(".yaml")
    assert not (path / RunFolder.EVENTS).exists()
    strange = tmp_path / "runs" / "strange"
    strange.mkdir()
    (strange / "mine.txt").touch()
    run_series._clear(strange)
    assert strange.exists(), "what is not a run's is left alone"


def test_runs_begin_together_or_say_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    answers = iter([(0, ""), (2, "error: a differs from b in model.name"), (1, "it broke")])

    class Stand:
        def __init__(self, command: list[str]) -> None:
            asked.append(command[command.index("together") + 1 :])

        def wait(self) -> tuple[int, str]:
            return next(answers)

    monkeypatch.setattr(run_series, "_Process", Stand)
    place = {"directory": str(tmp_path / "runs")}
    configs = [build_config({"output": place, "training": {"seed": seed}}) for seed in (1, 2, 3)]
    write_begun(tmp_path / "runs" / configs[2].run_name())
    assert carry_out_together(configs, tmp_path / "configs") == ""
    assert [Path(file).stem for file in asked[0]] == [config.run_name() for config in configs[:2]]
    assert carry_out_together(configs[1:], tmp_path / "configs") == "", "one alone is no company"
    assert len(asked) == 1
    assert "differs from b" in carry_out_together(configs, tmp_path / "configs")
    with pytest.raises(RunError, match=r"2 runs together failed \(exit code 1\): it broke"):
        carry_out_together(configs, tmp_path / "configs")
