"""Pages and terminal of an evaluation: scores, what was not computed, and examples best, worst and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folder_fixture import fabricate_run, score

from pages import check_page
from peftlab.commands.answers import shown_examples
from peftlab.report import write_report
from peftlab.report.answers import answer_section
from peftlab.report.evaluation_page import write_evaluation_page
from peftlab.report.score_table import score_section

WHY = "METEOR 1.5 needs Java; install it with: apt install <default-jre-headless>"
CHOSEN: dict[str, Any] = {
    "metric": "bleu", "unit": "0-100", "higher_is_better": True, "note": "bleu of each example alone",
    "best": [{"id": "test-7", "score": 93.5}], "worst": [{"id": "test-90", "score": 0.25}],
    "random": [{"id": "test-3", "score": 50.0}],
}  # fmt: skip


def rows(count: int = 4, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"e{i}", "source": f"s{i}", "prompt": f"say <{i}>", "prediction": f"p{i}", "references": [f"r{i}"]} | changes
        for i in range(count)
    ]  # fmt: skip


def result(**half: Any) -> dict[str, Any]:
    after = {
        "metrics": {"bleu": score("bleu", 12.0, 1.0)},
        "decoding": {"kind": "greedy"},
        "seconds": 1.0,
    } | half
    return {"task": "made", "split": "test", "num_examples": 4, "before": None, "after": after}


def test_a_runs_page_shows_best_worst_and_random(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, steps=12)
    path = run.path / "embedded_evaluation.json"
    whole = json.loads(path.read_text())
    whole["after"] |= {"examples": CHOSEN, "not_computed": {"meteor": WHY}}
    path.write_text(json.dumps(whole))
    page = check_page(write_report(run.path))
    places = [page.index(word) for word in ("<h3>Best</h3>", "test-7:", "<h3>Worst</h3>", "test-90:")]
    assert places == sorted(places)
    assert page.index("<h3>Drawn at random</h3>") > places[-1]
    assert page.count('class="example"') == 3
    assert "test-7: bleu 93.50" in page
    assert page.count(">before<") >= 3, "the base's answers stand beside the adapter's"
    assert "area[riverside] &lt;7&gt;" not in page, "the prompt is shown, not the source"
    assert "meteor</td>" in page
    assert (
        "not computed: METEOR 1.5 needs Java; install it with: apt install &lt;default-jre-headless&gt;"
        in page
    )
    assert "(after training alone)" in page


def test_what_was_never_computed_is_no_zero() -> None:
    section = score_section(result(not_computed={"meteor": WHY}), trained=False)
    row = section.html[section.html.index("<td>meteor") :]
    assert "not computed: METEOR" in row
    assert "training alone" not in row
    assert "0.00" not in row[: row.index("</tr>")]
    both = result(not_computed={"meteor": WHY})
    both["before"] = both["after"]
    assert score_section(both).html.count("not computed") == 1
    assert "training alone" not in score_section(both).html


def test_texts_are_escaped_and_long_ones_folded(tmp_path: Path) -> None:
    texts = rows(prediction="<script>alert(1)</script> " + "x" * 900, references=["<i>", *"abcdef"])
    chosen = CHOSEN | {"best": [], "worst": [], "random": [{"id": "e1", "score": None, "probability": 0.5}]}
    page = check_page(write_evaluation_page(result(examples=chosen), texts, tmp_path, title="a <model>"))
    assert "&lt;script&gt;alert(1)" in page
    assert "<details><summary>526 more characters</summary>" in page
    assert "and 4 more references" in page
    assert "a probability of 0.50" in page
    assert "<h3>Best</h3>" not in page
    assert ">change<" not in page, "there is nothing to compare with"


def test_an_evaluation_that_does_not_say_which() -> None:
    section = answer_section(None, {"before": rows(3), "after": rows(2, prediction="")})
    assert "The first 3 test examples, as they come, not chosen." in section.html
    assert section.html.count("(nothing)") == 2


def test_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    kinds = {
        kind: [{"id": f"e{i}", "score": float(i)} for i in range(3)] for kind in ("best", "worst", "random")
    }
    texts = rows(prediction="word " * 60, references=["first\nline", "second"])
    told = shown_examples({"examples": CHOSEN | kinds}, texts)
    assert all(len(line) <= 70 for line in told.splitlines())
    assert told.splitlines()[2:6] == [
        "best: e0, bleu 0.00",
        "  prompt    say <0>",
        "  reference first line (and 1 more)",
        "  answer    word word word word word w ... d word word word word word",
    ]
    assert told.count("\nbest: ") == told.count("\ndrawn at random: ") == 2
    assert shown_examples({}, texts) == ""
