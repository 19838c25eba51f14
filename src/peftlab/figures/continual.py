"""Scores of tasks that were learned one after another: the matrix of each arm as a heat-map, and a curve for each task."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.figures.canvas import DPI, FAINT, INK, MUTED, RUN_COLOURS, heading, plain, sheet
from peftlab.files import write_text

_COLUMNS = 3
_ASIDE = 0.025
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, slots=True)
class TaskScores:
    """The scores of one arm.

    Attributes:
        name: The arm.
        stages: What each row is after; the first is the base.
        tasks: The tasks.
        rows: Scores, the mean over seeds, shape (stages, tasks).
        intervals: The interval over seeds of each, None where there is one seed.
        learned: Stage at which each task was learned, as a row of `rows`.
    """

    name: str
    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    intervals: tuple[tuple[tuple[float, float] | None, ...], ...]
    learned: tuple[int, ...]


def plot_score_matrix(
    arms: Sequence[TaskScores], output_path: str | Path, *, metric: str, unit: str
) -> list[Path]:
    """Draw a heat-map with numbers for each arm: a row for each stage, a column for each task.

    The scores of a task at and after the stage at which it was learned are framed: what they lose from row to row is
    forgotten.

    Args:
        arms: The arms.
        output_path: The PNG file; an SVG goes beside it.
        metric: The metric's name.
        unit: Its unit.

    Returns:
        Both files.

    Raises:
        OutputError: A file cannot be written.
    """
    columns = min(_COLUMNS, len(arms))
    lines = -(-len(arms) // columns)
    values = [value for arm in arms for row in arm.rows for value in row]
    low, high = min(0.0, *values), max(values) or 1.0
    deep = max(len(arm.stages) for arm in arms)
    svg = io.StringIO()
    height = 1.15 + lines * (0.95 + 0.42 * deep)
    with sheet(output_path, width=3.75 * columns + 0.9, height=height) as figure:
        heading(
            figure,
            "Every task after every stage",
            f"{metric} ({unit}), mean over seeds · rows: after which task · framed: tasks that had been learned",
        )
        every = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
        image = None
        for axes, arm in zip(every, arms, strict=False):
            image = axes.imshow(arm.rows, cmap="viridis", vmin=low, vmax=high, aspect="auto")
            _label(axes, arm)
            _write(axes, arm, low, high)
        for axes in every[len(arms) :]:
            axes.set_axis_off()
        bar = figure.colorbar(image, ax=every, fraction=0.03, pad=0.015, aspect=26)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        _save_svg(figure, svg)
    return [Path(output_path), write_text(Path(output_path).with_suffix(".svg"), svg.getvalue())]


def _label(axes: Any, arm: TaskScores) -> None:
    """Names of arm, stages and tasks."""
    axes.set_title(plain(arm.name, 32))
    axes.set_xticks(range(len(arm.tasks)), [plain(task, 14) for task in arm.tasks])
    axes.set_yticks(range(len(arm.stages)), [plain(stage, 14) for stage in arm.stages])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _write(axes: Any, arm: TaskScores, low: float, high: float) -> None:
    """The numbers, and frames around what had been learned."""
    from matplotlib.patches import Rectangle

    for y, row in enumerate(arm.rows):
        for x, value in enumerate(row):
            share = (value - low) / ((high - low) or 1.0)
            axes.text(
                x,
                y,
                f"{value:.3g}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if share < 0.6 else "black",
            )
            if y >= arm.learned[x]:
                axes.add_patch(
                    Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#d55e00", lw=1.6)
                )


def plot_task_curves(
    arms: Sequence[TaskScores], output_path: str | Path, *, metric: str, unit: str
) -> list[Path]:
    """Draw a panel for each task: its score after each stage, a line for each arm.

    Args:
        arms: The arms; one that learned all at once is a point at the end.
        output_path: The PNG file; an SVG goes beside it.
        metric: The metric's name.
        unit: Its unit.

    Returns:
        Both files.

    Raises:
        OutputError: A file cannot be written.
    """
    tasks = arms[0].tasks
    columns = min(_COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    svg = io.StringIO()
    ends = [
        end for arm in arms for row, spans in zip(arm.rows, arm.intervals, strict=True)
        for value, span in zip(row, spans, strict=True) for end in (value, *(span or ()))
    ]  # fmt: skip
    with sheet(output_path, width=3.9 * columns + 0.4, height=1.7 + 2.9 * lines) as figure:
        heading(
            figure,
            "What becomes of each task",
            f"{metric} ({unit}), mean over seeds, 95 % interval where there are several · dotted: here it is learned",
        )
        every = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel().tolist()
        for place, task in enumerate(tasks):
            _curves(every[place], arms, place, task)
            every[place].set_ylim(min(0.0, *ends), max(ends) * 1.04 or 1.0)
        for axes in every[len(tasks) :]:
            axes.set_axis_off()
        for axes in every[::columns]:
            axes.set_ylabel(f"{metric} ({unit})")
        handles, names = every[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=min(4, len(names)))
        _save_svg(figure, svg)
    return [Path(output_path), write_text(Path(output_path).with_suffix(".svg"), svg.getvalue())]


def _curves(axes: Any, arms: Sequence[TaskScores], place: int, task: str) -> None:
    """One task's panel."""
    axes.set_title(plain(task, 30))
    longest = max(arms, key=lambda arm: len(arm.stages))
    last = len(longest.stages) - 1
    axes.set_xticks(range(last + 1), [plain(stage, 14) for stage in longest.stages])
    axes.axvline(longest.learned[place], color=FAINT, linestyle=":", linewidth=1.4, zorder=0)
    for number, arm in enumerate(arms):
        colour, mark = RUN_COLOURS[number % len(RUN_COLOURS)], _MARKS[number % len(_MARKS)]
        values = [row[place] for row in arm.rows]
        whole = len(values) == last + 1
        aside = (number - (len(arms) - 1) / 2) * _ASIDE  # lines that lie on each other are seen
        at = [x + aside for x in (range(last + 1) if whole else (0, last))]
        style = "-" if whole else ":"
        axes.plot(
            at,
            values,
            style,
            color=colour,
            marker=mark,
            markersize=4.5,
            label=plain(arm.name, 32),
            linewidth=1.6,
        )
        for x, span in zip(at, [spans[place] for spans in arm.intervals], strict=True):
            if span is not None:
                axes.plot([x, x], span, color=colour, linewidth=1.0, alpha=0.6)
    axes.set_xlabel("after learning", color=MUTED)


def _save_svg(figure: Any, stream: io.StringIO) -> None:
    """The same drawing as SVG, the same bytes every time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "peftlab", "svg.fonttype": "none", "text.color": INK}):
        figure.savefig(stream, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
