"""Run folders: making, finding, reading, logging events."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_folder_fixture import fabricate_run

from peftlab.errors import DataError, OutputError, RunError, UnknownNameError
from peftlab.run import RunFolder


def test_a_new_run_never_takes_an_old_folder(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path / "runs", "a").name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("name", ["", ".", "..", "last", "a/b", "a\\b"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot name a run folder"):
        RunFolder.create(tmp_path, name)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"choose another output\.directory"):
        RunFolder.create(tmp_path / "file", "a")


def test_finding_by_path_name_and_last(tmp_path: Path) -> None:
    first = fabricate_run(tmp_path, "first", until="started")
    second = fabricate_run(tmp_path, "second", until="started")
    for age, run in ((100, first), (200, second)):
        for name in (RunFolder.CONFIG, RunFolder.EVENTS):
            os.utime(run.path / name, (age, age))
    assert RunFolder.find("first", tmp_path).path == first.path
    assert RunFolder.find(str(first.path), tmp_path / "elsewhere").path == first.path
    assert RunFolder.find("last", tmp_path).path == second.path
    (first.path / "report.html").write_text("drawn again")  # looking at a run does not make it the last
    assert RunFolder.find("last", tmp_path).path == second.path
    first.append_event("resumed", step=0)
    assert RunFolder.find("last", tmp_path).path == first.path


def test_what_cannot_be_found_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no run in"):
        RunFolder.find("last", tmp_path)
    fabricate_run(tmp_path, "embedded-lora", until="started")
    with pytest.raises(UnknownNameError, match="did you mean 'embedded-lora'"):
        RunFolder.find("embeded-lora", tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match=r"is not a run folder: it has no config\.yaml"):
        RunFolder.find(tmp_path / "other", tmp_path)


def test_reading_a_finished_run(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path)
    assert run.is_finished
    assert run.config["adapters"][0]["settings"]["rank"] == 8
    assert run.environment["versions"]["python"] == "3.11.7"
    assert run.preflight["steps"]["total"] == 420
    assert run.summary()["status"] == "finished"
    assert run.evaluation()["after"]["metrics"]["bleu"]["value"] == 61.3
    assert len(run.predictions("predictions.after.jsonl")) == 120
    assert len(run.gradient_log()) == 420
    assert [e["event"] for e in run.events()][-1] == "run_finished"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, until="started")
    with pytest.raises(RunError, match=r"results_summary\.json is not there"):
        run.summary()
    with pytest.raises(DataError, match="when training ends"):
        run.gradient_log()
    (run.path / RunFolder.SUMMARY).write_text('{"name": ')
    with pytest.raises(RunError, match=r"results_summary\.json is damaged"):
        run.summary()
    (run.path / RunFolder.ENVIRONMENT).write_text("[]")
    with pytest.raises(RunError, match=r"environment\.json is damaged: a mapping is expected, not list"):
        _ = run.environment
    (run.path / RunFolder.CONFIG).write_text("a: [")
    with pytest.raises(RunError, match=r"config\.yaml is damaged"):
        _ = run.config


def test_events_of_a_running_run_leave_out_the_line_being_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    assert list(run.events()) == []
    run.append_event("step", step=1, loss=2.5, path="x", name="y")
    path = run.path / RunFolder.EVENTS
    path.write_bytes(path.read_bytes() + b'{"event": "step", "st')
    assert [event["loss"] for event in run.events()] == [2.5]
    run.append_event("step", step=2, loss=float("inf"))  # cuts the torn line off
    assert [event["loss"] for event in run.events()] == [2.5, "inf"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_event_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    (run.path / RunFolder.EVENTS).write_text('{"event": "run_started"}\n{"event": \n{"event": "step"}\n')
    with pytest.raises(RunError, match=r"events\.jsonl line 2 is damaged"):
        list(run.events())


def test_a_resumed_run_forgets_what_it_does_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    run.append_event("run_started")
    run.append_event("phase_started", step=0, phase="a")
    for step in range(1, 6):
        if step == 4:
            run.append_event("phase_started", step=3, phase="b")
        run.append_event("step", step=step, loss=1.0)
    run.drop_events_after(3)
    run.append_event("resumed", step=3)
    kept = [(event["event"], event.get("step")) for event in run.events()]
    assert kept == [
        ("run_started", None), ("phase_started", 0), ("step", 1), ("step", 2), ("step", 3), ("resumed", 3),
    ]  # fmt: skip


def test_the_timeline_leaves_out_attempts_that_were_replaced(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    for steps in (range(1, 6), range(1, 3)):  # killed before its first checkpoint, then started again
        run.append_event("run_started")
        for step in steps:
            run.append_event("step", step=step, loss=1.0)
    assert [e.get("step") for e in run.timeline()] == [None, 1, 2]
    run.append_event("resumed", step=1)
    assert [e.get("step") for e in run.timeline()] == [None, 1, 1]


def test_the_evaluation_is_that_of_the_runs_own_task(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path)
    (run.path / "another_evaluation.json").write_text("{}")
    path = run.evaluation_path()
    assert path is not None
    assert path.name == "embedded_evaluation.json"
