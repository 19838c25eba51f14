"""Charts: every shape of run draws without a warning, says what is missing, and leaves matplotlib as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from run_folder_fixture import fabricate_log, fabricate_run, norms_of

from peftlab import figures
from peftlab.errors import DataError, OutputError
from peftlab.figures.canvas import PhaseSpan, phase_spans, plain, segments, smooth
from peftlab.figures.losses import read_losses
from peftlab.gradient_log import GradientNormLog
from peftlab.run import RunFolder

GRADIENT_CHARTS = [
    figures.plot_gradient_norms,
    figures.plot_layer_heatmap,
    figures.plot_layer_comparison,
    figures.plot_gradient_evolution,
]
EIGHT = tuple((f"phase {i}", (("attention", "mlp"), ("mlp",), ("attention",))[i % 3]) for i in range(8))
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 24},
    "one step, one layer": {"steps": 1, "layers": 1, "phases": (("all", ("attention", "mlp")),)},
    "long and deep": {"steps": 1500, "layers": 48, "phases": EIGHT},
    "two stacks, formula in the name": {
        "steps": 12, "stacks": ("encoder", "decoder"), "phases": (("$x_$", ("mlp",)), ("学習", ("mlp",))),
    },
    "attention never": {"steps": 12, "groups": ("mlp",)},
    "nothing active": {"steps": 12, "groups": ()},
}  # fmt: skip


@pytest.mark.parametrize("plot", GRADIENT_CHARTS, ids=lambda plot: plot.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_charts_draw_every_shape(plot: Callable[..., Path], shape: str, tmp_path: Path) -> None:
    path = plot(fabricate_log(**SHAPES[shape]), tmp_path / "plots" / "chart.png")
    height, width, _ = mpl.image.imread(path).shape
    assert width >= 1500
    assert height >= 300


@pytest.mark.parametrize("plot", GRADIENT_CHARTS, ids=lambda plot: plot.__name__)
def test_gradient_charts_take_extreme_values(plot: Callable[..., Path], tmp_path: Path) -> None:
    log = GradientNormLog(clipped=True)
    for step, value in enumerate([0.0, 1e-30, 1e30, math.inf, math.nan, None], 1):
        log.append(step * 10, norms_of({"layer_0_attention": value, "layer_1_attention": 0.0}))
    assert plot(log, tmp_path / "chart.png").exists()
    assert plot(GradientNormLog(), tmp_path / "empty.png").exists()


@pytest.mark.parametrize("plot", GRADIENT_CHARTS, ids=lambda plot: plot.__name__)
def test_all_sources_give_the_same_picture(plot: Callable[..., Path], tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, steps=30)
    csv = run.path / "gradient_analysis.group_norms.csv"
    sources: list[Any] = [run, run.path, str(run.path), csv, run.gradient_log()]
    pictures = {plot(source, tmp_path / f"{i}.png").read_bytes() for i, source in enumerate(sources)}
    assert len(pictures) == 1


@pytest.mark.parametrize("until", ["started", "training", "finished"])
def test_the_loss_chart_draws_unfinished_runs(until: str, tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, until=until)
    path = figures.plot_training_loss(run, tmp_path / "loss.png")
    from_events = figures.plot_training_loss(run.path / "events.jsonl", tmp_path / "again.png")
    assert path.read_bytes() == from_events.read_bytes()


def test_losses_hold_the_last_attempt_only(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    for loss, steps in ((9.0, 5), (1.0, 3)):
        run.append_event("run_started")
        for step in range(1, steps + 1):
            run.append_event("step", step=step, loss=loss)
    assert read_losses(run).training == [1.0, 1.0, 1.0]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    mpl.rcParams["font.size"] = 17.0
    try:
        before = dict(mpl.rcParams)
        figures.plot_gradient_norms(fabricate_log(steps=5), tmp_path / "a.png")
        assert dict(mpl.rcParams) == before
    finally:
        mpl.rcdefaults()


def test_sources_and_places_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or file"):
        figures.plot_gradient_norms(tmp_path / "nothing.csv", tmp_path / "a.png")
    with pytest.raises(DataError, match="has no losses"):
        figures.plot_training_loss(tmp_path / "nothing", tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        figures.plot_gradient_norms(fabricate_log(steps=2), tmp_path / "file" / "a.png")


def test_phases_come_from_the_argument_the_run_or_the_log(tmp_path: Path) -> None:
    log = fabricate_log(steps=9)
    expected = [PhaseSpan("both", 0, 3), PhaseSpan("mlp", 3, 6), PhaseSpan("attention", 6, 9)]
    assert phase_spans(log, log, None) == expected
    given = [{"name": "x", "start_step": 0, "end_step": 9}]
    assert phase_spans(log, log, given) == [PhaseSpan("x", 0, 9)]
    run = fabricate_run(tmp_path, steps=9)
    assert phase_spans(run, None, None) == expected


def test_segments_break_at_blanks_and_at_marks() -> None:
    assert segments([1.0, None, 2.0, 3.0]) == [(0, 1), (2, 4)]
    assert segments([1.0, 2.0, 3.0], ["a", "a", "b"]) == [(0, 2), (2, 3)]


def test_smoothing_is_the_mean_of_what_there_is() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, 7.0])
    assert smooth(values, 3).tolist() == [1.0, 2.0, 4.0, 5.0, 6.0]
    assert smooth(values, 1)[2] == 3.0


def test_text_is_drawn_as_it_stands() -> None:
    assert plain("a $b$\nc") == r"a \$b\$ c"
    assert plain("x" * 9, 5) == "xxxx…"
    assert plain("embedded-lora-1a2b", 9, keep_end=True) == "embe…1a2b"


def test_the_text_report_covers_the_run_and_bare_gradient_files(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path)
    text = figures.generate_summary_report(run.path, tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == text
    for expected in (
        "61.30 [58.90, 63.70]",
        "196,608 (5.69 %)",
        "attention / MLP: 0.5",
        "141 to 280",
        "812 MiB",
    ):
        assert expected in text
    bare = tmp_path / "bare"
    bare.mkdir()
    fabricate_log(steps=5).write(bare)
    assert "GRADIENT NORMS" in figures.generate_summary_report(bare)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds nothing of a run"):
        figures.generate_summary_report(tmp_path / "empty")
