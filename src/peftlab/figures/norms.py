"""Group norms over steps, linear and logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import (
    GROUP_COLOURS,
    GROUP_NAMES,
    NORM_LABEL,
    Source,
    draw_phases,
    heading,
    log_axis,
    open_log,
    phase_spans,
    say,
    segments,
    sheet,
    smooth,
    smoothing_window,
    step_axis,
)
from peftlab.gradient_files import GROUPS
from peftlab.gradient_log import GradientNormLog


def plot_gradient_norms(
    source: Source, output_path: str | Path, *, phases: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    """Draw the norm of each group's gradient over the run, on a linear and on a logarithmic axis.

    Lines break where a group is frozen; phases are marked.

    Args:
        source: A gradient log, a run folder, or one of its gradient files.
        output_path: The PNG file.
        phases: Mappings with name, start_step and end_step; the source's own where None.

    Returns:
        The file.

    Raises:
        DataError: The source holds no gradient norms.
        RunError: Its files are damaged.
        OutputError: The file cannot be written.
    """
    from matplotlib.lines import Line2D

    log = open_log(source)
    spans = phase_spans(source, log, phases)
    active = [group for group in GROUPS if any(v is not None for v in log.norms(group))]
    with sheet(output_path, height=7.2 if active else 3.0) as figure:
        window = smoothing_window(len(log))
        heading(figure, "Gradient norm of each group", _explain(log, window))
        if not active:
            say(figure.subplots(), nothing_to_draw(log))
            return Path(output_path)
        linear, logarithmic = figure.subplots(2, 1, sharex=True)
        for axes, is_log in ((linear, False), (logarithmic, True)):
            for group in active:
                _draw_group(axes, log, group, window, is_log=is_log)
            axes.set_ylabel(NORM_LABEL + (", log scale" if is_log else ""))
        step_axis(linear, log.steps[0], log.steps[-1], label=False)
        step_axis(logarithmic, log.steps[0], log.steps[-1])
        _scale(linear, logarithmic)
        draw_phases([linear, logarithmic], spans)
        handles = [line for line in linear.get_lines() if not str(line.get_label()).startswith("_")]
        blank = [GROUP_NAMES[group] for group in GROUPS if group not in active]
        if blank:
            note = "no active tensor:\n" + "\n".join(f"  {name}" for name in blank)
            handles.append(Line2D([], [], linestyle="none", label=note))
        figure.legend(handles=handles, loc="outside right upper")
    return Path(output_path)


def nothing_to_draw(log: GradientNormLog) -> str:
    """The sentence for a log without any norm.

    Args:
        log: The log.
    """
    if not log.steps:
        return "no step has been measured yet"
    return "no active tensor in any group: nothing had a gradient in the measured steps"


def _explain(log: GradientNormLog, window: int) -> str:
    """How to read the chart."""
    moment = "after clipping" if log.clipped else "of the whole optimizer step, before clipping"
    parts = [f"Gradient {moment}"]
    if window > 1:
        parts.append(f"pale: every step, bold: mean over {window} rows")
    return " · ".join(parts)


def _draw_group(axes: Any, log: GradientNormLog, group: str, window: int, *, is_log: bool) -> None:
    """One group's line, broken where it is frozen, with what is not finite at the upper edge."""
    import numpy as np

    values, colour, total = log.norms(group), GROUP_COLOURS[group], group == "total"
    style = {"color": colour, "zorder": 2.0 if total else 2.5, "linestyle": (0, (1.2, 1.4)) if total else "-"}
    few, label = len(log) <= 40, GROUP_NAMES[group]
    for first, end in segments(values, log.phases):
        steps = np.array(log.steps[first:end])
        numbers = np.array([np.nan if v is None else v for v in values[first:end]])
        bad = ~np.isfinite(numbers)
        numbers = np.where(bad | (is_log & (numbers <= 0)), np.nan, numbers)
        marker = "o" if few or end - first == 1 else None
        if window > 1 and not total:
            axes.plot(steps, numbers, color=colour, alpha=0.25, linewidth=0.7, zorder=2)
        smoothed = numbers if marker else smooth(numbers, window)
        axes.plot(
            steps, smoothed, label=label, marker=marker, markersize=3.5, linewidth=1.2 if total else 1.8, **style
        )  # fmt: skip
        label = "_"
        if bad.any():
            axes.plot(
                steps[bad], np.full(bad.sum(), 0.985), "x", color=colour, transform=axes.get_xaxis_transform(),
                markersize=6, markeredgewidth=1.8, zorder=4, label=f"{GROUP_NAMES[group]}: not finite",
            )  # fmt: skip


def _scale(linear: Any, logarithmic: Any) -> None:
    """The linear axis from 0; the logarithmic one over the positive values."""
    import numpy as np

    lines = [line for line in logarithmic.get_lines() if line.get_marker() != "x"]
    found = [np.asarray(line.get_ydata(), dtype=float) for line in lines]
    numbers = np.concatenate([y for y in found if len(y)] or [np.array([])])
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers):
        low, high = numbers.min(), numbers.max()
        log_axis(logarithmic, float(low), float(high))
        linear.set_ylim(0, high * 1.06)
    else:
        linear.set_ylim(0, 1)
        say(logarithmic, "no norm above zero to draw on a logarithmic axis")
