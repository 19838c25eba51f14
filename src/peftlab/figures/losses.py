"""The chart of a run's losses."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.errors import DataError
from peftlab.figures.canvas import (
    GROUP_COLOURS,
    INK,
    draw_phases,
    heading,
    phase_spans,
    say,
    sheet,
    smooth,
    smoothing_window,
    step_axis,
)
from peftlab.losses import LOSS_LABEL, Losses, read_losses
from peftlab.run import RunFolder


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
                label=f"training, with\n{losses.beside}" if losses.beside else "training",
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
