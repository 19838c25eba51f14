"""The page: one file, complete for a finished run, honest for an unfinished one."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from run_folder_fixture import fabricate_run

from pages import check_page
from peftlab.errors import DataError, RunError
from peftlab.report import write_comparison, write_report
from peftlab.run import RunFolder

PLOTS = {"gradient_norms", "layer_heatmap", "layer_comparison", "gradient_evolution", "training_loss"}


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_finished_run_has_every_section_and_plot(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path)
    page = check_page(write_report(run.path))
    assert headings(page) == [
        "Scores", "Cost", "Phases", "Loss", "Gradient norms", "Answers", "Data", "Environment", "Config",
    ]  # fmt: skip
    assert {path.stem for path in run.plots.glob("*.png")} == PLOTS
    assert page.count("<img") == 5
    assert page.count('class="example"') == 8
    assert "Not there yet" not in page
    for expected in (
        "61.30 [58.90, 63.70]",
        "+58.20",
        "196,608",
        "812 MiB",
        "all 48 within 2 steps",
        "nrefs:2",
    ):
        assert expected in page


def test_answers_are_escaped(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, until="started")
    page = check_page(write_report(run.path))
    assert "the the the restaurant the &lt;s&gt; &amp; the" in page


@pytest.mark.parametrize("until", ["started", "training"])
def test_an_unfinished_run_says_what_is_not_there_yet(until: str, tmp_path: Path) -> None:
    page = check_page(write_report(fabricate_run(tmp_path, until=until)))
    assert "not finished" in page
    assert page.count("Not there yet") >= 3
    assert "not started" in page


def test_an_empty_folder_gets_a_page_too(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "<b>empty & new")
    page = check_page(write_report(run))
    assert "&lt;b&gt;empty &amp; new" in page
    assert page.count("Not there yet") == len(headings(page))


def test_a_run_without_an_evaluation_before_training(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, until="started")
    path = run.path / "embedded_evaluation.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"before": None, "after": whole["before"]}))
    page = check_page(write_report(run))
    assert "3.10 [2.50, 3.70]" in page
    assert page.count('class="example"') == 8


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, until="training")
    run.append_event("alarm", step=210, kind="not finite", names=[f"layer.{i}" for i in range(9)])
    run.append_event("run_failed", error="the loss is NaN <at> step 211")
    page = check_page(write_report(run))
    assert "failed: the loss is NaN &lt;at&gt; step 211" in page
    assert "and 3 more" in page


@pytest.mark.parametrize("name", ["results_summary.json", "preflight.json", "embedded_evaluation.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, steps=12)
    (run.path / name).write_text('{"broken": ')
    with pytest.raises(RunError, match=re.escape(name)):
        write_report(run)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(DataError, match="is not a folder"):
        write_comparison([tmp_path / "nothing"])
    with pytest.raises(DataError, match="no run is given"):
        write_comparison([])


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        fabricate_run(tmp_path, "a", steps=40),
        fabricate_run(tmp_path, "b", steps=40, rank=16, bleu=70.0),
    ]
    write_report(runs[0])
    page = check_page(write_comparison([run.path for run in runs]), sortable=True)
    assert (tmp_path / "comparison.html").exists()
    assert headings(page) == [
        "Scores", "Runs", "What a score costs", "Results", "Settings that differ", "Loss"
    ]  # fmt: skip
    assert f'href="{runs[0].report.as_uri()}"' in page
    numbers = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [one["metrics"]["bleu"]["value"] for one in numbers["runs"]][1] == 70.0
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["bleu value"] for line in lines][1] == "70.0"
    assert [line["run"] for line in lines] == [one["run"] for one in numbers["runs"]]
    assert "adapters[0].settings.rank" in page
    assert "70.00 [67.60, 72.40]" in page
    other = write_comparison(runs, tmp_path / "other.html")
    assert other == tmp_path / "other.html"
