"""Charts of losses and scores: of one run, and of several over each other."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import DataError
from peftlab.figures.canvas import (
    FAINT,
    GROUP_COLOURS,
    INK,
    MUTED,
    RUN_COLOURS,
    draw_phases,
    heading,
    phase_spans,
    plain,
    say,
    sheet,
    smooth,
    smoothing_window,
    step_axis,
)
from peftlab.run import RunFolder

LOSS_LABEL = "loss (cross-entropy, nats)"


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of one run.

    Attributes:
        steps: Step of each training loss.
        training: The training losses.
        validation_steps: Step of each validation loss.
        validation: The validation losses.
    """

    steps: list[int]
    training: list[float]
    validation_steps: list[int]
    validation: list[float]


def read_losses(run: RunFolder) -> Losses:
    """The losses that hold, in the order of their steps.

    Args:
        run: The run.

    Returns:
        The losses; empty where nothing was logged yet.

    Raises:
        RunError: The event log is damaged.
    """
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    for event in run.timeline():
        if event["event"] == "step":
            training[event["step"]] = float(event["loss"])
        elif event["event"] == "validated":
            validation[event["step"]] = float(event["validation_loss"])
    steps, marks = sorted(training), sorted(validation)
    return Losses(steps, [training[s] for s in steps], marks, [validation[s] for s in marks])


def plot_training_loss(
    source: RunFolder | str | os.PathLike[str],
    output_path: str | Path,
    *,
    phases: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Draw training and validation loss over the run, with its phases and its best checkpoint.

    Args:
        source: A run folder, or its events.jsonl.
        output_path: The PNG file.
        phases: Mappings with name, start_step and end_step; the run's own where None.

    Returns:
        The file.

    Raises:
        DataError: The source is no run folder with an event log.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    run = _open(source)
    losses = read_losses(run)
    spans = phase_spans(run, None, phases)
    with sheet(output_path, height=4.6 if losses.steps or losses.validation else 3.0) as figure:
        window = smoothing_window(len(losses.steps))
        note = f"Pale: every logged step, bold: mean over {window} of them" if window > 1 else ""
        heading(figure, "Training and validation loss", note)
        axes = figure.subplots()
        if not losses.steps and not losses.validation:
            say(axes, "no step has been logged yet")
            return Path(output_path)
        colour = GROUP_COLOURS["attention"]
        if losses.steps:
            marker = "o" if len(losses.steps) <= 40 else None
            if window > 1:
                axes.plot(losses.steps, _gaps(losses.training), color=colour, alpha=0.28, linewidth=0.7)
            axes.plot(
                losses.steps, smooth(losses.training, window), color=colour, linewidth=1.9, marker=marker, markersize=3,
                label="training",
            )  # fmt: skip
        if losses.validation:
            axes.plot(
                losses.validation_steps, _gaps(losses.validation), color=GROUP_COLOURS["mlp"], linewidth=1.3,
                marker="s", markersize=4.5, label="validation",
            )  # fmt: skip
        every = [*losses.steps, *losses.validation_steps]
        step_axis(axes, min(every), max(every))
        axes.set_ylabel(LOSS_LABEL)
        _mark_best(axes, _best(run, losses))
        draw_phases([axes], spans)
        figure.legend(loc="outside right upper")
    return Path(output_path)


def plot_loss_comparison(runs: Sequence[tuple[str, RunFolder]], output_path: str | Path) -> Path:
    """Draw the losses of several runs over each other.

    Args:
        runs: Label and run of each.
        output_path: The PNG file.

    Returns:
        The file.

    Raises:
        RunError: An event log is damaged.
        OutputError: The file cannot be written.
    """
    read = [(label, read_losses(run)) for label, run in runs]
    read = [(label, losses) for label, losses in read if losses.steps or losses.validation]
    with sheet(output_path, height=4.8 if read else 3.0) as figure:
        heading(
            figure, "Loss of each run", "Line: training, mean over neighbouring steps · squares: validation"
        )
        axes = figure.subplots()
        if not read:
            say(axes, "no step has been logged yet in any of these runs")
            return Path(output_path)
        dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
        for i, (label, losses) in enumerate(read):
            look = {
                "color": RUN_COLOURS[i % len(RUN_COLOURS)],
                "linestyle": dashes[i // len(RUN_COLOURS) % 4],
            }
            lines = smooth(losses.training, smoothing_window(len(losses.steps)))
            axes.plot(losses.steps, lines, linewidth=1.7, label=plain(label, 40, keep_end=True), **look)
            axes.plot(
                losses.validation_steps, _gaps(losses.validation), "s", markersize=4.5, color=look["color"],
                markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
        every = [s for _, losses in read for s in (*losses.steps, *losses.validation_steps)]
        step_axis(axes, min(every), max(every))
        axes.set_ylabel(LOSS_LABEL)
        figure.legend(loc="outside right upper")
    return Path(output_path)


def plot_score_comparison(
    scores: Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, Any] | None]], output_path: str | Path
) -> Path:
    """Draw the scores of several runs: a bar after training with its interval, a line where it began.

    Args:
        scores: Label, metrics before and metrics after of each run, as in `{task}_evaluation.json`.
        output_path: The PNG file.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    names = list(dict.fromkeys(m for _, before, after in scores for m in [*(after or {}), *(before or {})]))
    height = 1.4 + max(1, len(names)) * (0.7 + 0.34 * len(scores)) if names else 3.0
    with sheet(output_path, height=min(height, 40.0)) as figure:
        heading(
            figure, "Scores of each run", "Bar: after training · whisker: 95 % interval over test examples · line: before"
        )  # fmt: skip
        if not names:
            say(figure.subplots(), "none of these runs has been scored yet")
            return Path(output_path)
        for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
            _draw_scores(axes, name, scores)
    return Path(output_path)


# -- inside -------------------------------------------------------------------------------------------------------


def _open(source: RunFolder | str | os.PathLike[str]) -> RunFolder:
    """The run that a source stands for."""
    if isinstance(source, RunFolder):
        return source
    path = Path(source)
    path = path.parent if path.name == RunFolder.EVENTS else path
    if not path.is_dir():
        raise DataError(f"{source} has no losses; give a run folder or its {RunFolder.EVENTS}")
    return RunFolder(path)


def _gaps(values: Sequence[float]) -> list[float]:
    """Values with NaN, which breaks a line, for what is not finite."""
    return [v if math.isfinite(v) else math.nan for v in values]


def _best(run: RunFolder, losses: Losses) -> tuple[int, float] | None:
    """Step and validation loss of the best checkpoint: the run's own word, else the lowest so far."""
    if run.has(RunFolder.SUMMARY):
        best = run.summary().get("best_checkpoint")
        return (int(best["step"]), float(best["validation_loss"])) if best else None
    pairs = [
        (v, s) for s, v in zip(losses.validation_steps, losses.validation, strict=True) if math.isfinite(v)
    ]
    return (min(pairs)[1], min(pairs)[0]) if pairs else None


def _mark_best(axes: Any, best: tuple[int, float] | None) -> None:
    """A star on the best checkpoint."""
    if best is None:
        return
    step, loss = best
    axes.plot(
        [step], [loss], "*", markersize=15, color="#e3a008", markeredgecolor=INK, markeredgewidth=0.8, zorder=5,
        label=f"best: step {step:,},\nvalidation {loss:.4f}", linestyle="none",
    )  # fmt: skip


def _draw_scores(axes: Any, name: str, scores: Sequence[tuple[str, Any, Any]]) -> None:
    """The bars of one metric."""
    unit, better = "", True
    for place, (_, before, after) in enumerate(scores):
        colour = RUN_COLOURS[place % len(RUN_COLOURS)]
        for part in (before, after):
            if part and name in part:
                unit, better = part[name]["unit"], part[name]["higher_is_better"]
        if after and name in after:
            value, interval = after[name]["value"], after[name].get("interval")
            axes.barh(place, value, 0.62, color=colour, alpha=0.85)
            if interval:
                axes.plot(interval, [place, place], color=INK, linewidth=1.1, marker="|", markersize=6)
            axes.annotate(
                f"{value:.3g}" if unit == "rate" else f"{value:.2f}", (max([value, *(interval or [])]), place),
                xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
        else:
            start = before[name]["value"] if before and name in before else 0.0
            axes.annotate(
                "not scored yet",
                (start, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
            )
        if before and name in before:
            value = before[name]["value"]
            axes.plot([value, value], [place - 0.36, place + 0.36], color=INK, linewidth=2.2)
            axes.plot([value, value], [place - 0.36, place + 0.36], color="white", linewidth=0.7)
    axes.set_yticks(range(len(scores)), [plain(label, 40, keep_end=True) for label, _, _ in scores])
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.margins(x=0.12)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0] if axes.dataLim.x0 < 0 else 0.0))
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_title(f"{plain(name)} ({plain(unit)}, {'higher' if better else 'lower'} is better)")
