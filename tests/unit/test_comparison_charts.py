"""The charts of several runs: every run and metric in them, honest axes, no chart library."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from run_folder_fixture import fabricate_run

from peftlab.figures import generate_summary_report
from peftlab.losses import Losses, read_losses
from peftlab.report.comparison_charts import draw_losses, draw_scores


def score(value, interval=None, higher=True):
    return {"value": value, "interval": interval, "unit": "points (0-100)", "higher_is_better": higher}


def drawing(html):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.S).group())


def bars(html):
    return [float(r.get("width")) for r in drawing(html).iter("rect")]


def test_bars_are_as_long_as_their_scores():
    html = draw_scores([("a", None, {"bleu": score(80.0, [75.0, 85.0])}), ("b", None, {"bleu": score(40.0)})])
    long, short = bars(html)
    assert long == pytest.approx(2 * short, rel=0.01)
    texts = [t.text for t in drawing(html).iter("text")]
    assert "bleu (points (0-100), higher is better)" in texts
    assert {"a", "b", "80", "40"} <= set(texts)


def test_a_score_below_nothing_goes_to_the_left():
    html = draw_scores([("a", None, {"gain": score(-5.0, [-8.0, 2.0])}), ("b", None, {"gain": score(5.0)})])
    left, right = drawing(html).iter("rect")
    assert float(left.get("x")) < float(right.get("x"))
    assert float(left.get("width")) == pytest.approx(float(right.get("width")), abs=0.2)


def test_what_is_not_there_is_said():
    assert "not scored yet" in draw_scores([("a", {"bleu": score(1.0)}, None)])
    assert "Not there yet" in draw_scores([("a", None, None)])
    assert "Not there yet" in draw_losses([("a", Losses([], [], [], []))])


def test_losses_are_lines_and_squares_and_gaps_are_left_out():
    steps = list(range(1, 1001))
    curve = [4.0 / s**0.3 for s in steps]
    curve[500] = float("nan")
    html = draw_losses(
        [
            ("one <run>", Losses(steps, curve, [500, 1000], [1.0, float("inf")])),
            ("two", Losses([], [], [5], [2.0])),
        ]
    )
    lines = list(drawing(html).iter("polyline"))
    points = [tuple(map(float, p.split(","))) for p in lines[0].get("points").split()]
    assert len(points) <= 400
    assert all(b[0] > a[0] for a, b in pairwise(points)), "to the right"
    assert points[0][1] < points[-1][1], "downwards: SVG counts from the top"
    assert len(list(drawing(html).iter("rect"))) == 2, "one finite validation loss of each run"
    assert "one &lt;run&gt;" in html


def test_a_loss_that_holds_more_says_so():
    beside = "AdaLoRA's orthogonality term"
    html = draw_losses(
        [("a", Losses([1, 2], [4.0, 3.0], [], [], beside)), ("b", Losses([1, 2], [4.0, 3.0], [], []))]
    )
    assert "a (training with AdaLoRA&#x27;s orthogonality term)</span>" in html
    assert "b</span>" in html


@pytest.mark.parametrize(("weight", "said"), [(0.5, "AdaLoRA's orthogonality term"), (0.0, "")])
def test_what_adalora_adds_to_its_loss_is_read_from_the_run(tmp_path: Path, weight: float, said: str) -> None:
    run = fabricate_run(tmp_path, steps=30)
    assert read_losses(run).beside == ""
    path = run.path / "config.yaml"
    text = path.read_text().replace("method: lora", "method: adalora")
    path.write_text(text.replace("rank: 8", f"orthogonality: {weight}"))
    assert read_losses(run).beside == said
    assert ("(holds AdaLoRA's orthogonality term too)" in generate_summary_report(run)) == bool(said)


def test_a_few_wild_losses_do_not_flatten_the_rest():
    steps = list(range(1, 201))
    html = draw_losses([("a", Losses(steps, [900.0] + [2.0 - s / 200 for s in steps[1:]], [], []))])
    ticks = [t.text for t in drawing(html).iter("text")]
    assert "900" not in ticks
    assert "2" in ticks


def test_no_chart_library_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, peftlab.report.comparison_charts;"
        " print([m for m in ('matplotlib', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
