"""What all charts share: sheet, colours, phases, lines with breaks, and the way to disk.

Charts are drawn with matplotlib's object interface on Agg: no window, no pyplot, the caller's rcParams as they were.
matplotlib and numpy load when the first chart is drawn.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import OutputError
from peftlab.gradient_log import GradientNormLog, load_gradient_log
from peftlab.run import RunFolder

DPI = 150
INK, MUTED, FAINT = "#222222", "#5f6368", "#b8bcc2"
GROUP_COLOURS = {
    "attention": "#0072b2",
    "mlp": "#d55e00",
    "embed": "#009e73",
    "lm_head": "#cc79a7",
    "other": "#8c6d1f",
    "total": "#3c4043",
}
"""Okabe and Ito 2008: apart from each other for colour-blind readers and in grey print."""
GROUP_NAMES = {
    "attention": "attention",
    "mlp": "MLP",
    "embed": "embedding",
    "lm_head": "LM head",
    "other": "other",
    "total": "total",
}
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "#3c4043")
NORM_LABEL = "gradient norm (L2)"
STEP_LABEL = "optimizer step"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.6,
}

Source = GradientNormLog | RunFolder | str | os.PathLike[str]
"""A log, a run folder, or one of the gradient files."""


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """One phase on the step axis.

    Attributes:
        name: What it is called.
        start: Its first step is the one after this.
        end: Its last step.
    """

    name: str
    start: float
    end: float


@contextmanager
def sheet(path: str | os.PathLike[str], *, width: float = 10.0, height: float = 5.0) -> Iterator[Any]:
    """A figure that is written when the block ends.

    Args:
        path: The PNG file; its folder is made where missing.
        width: Inches.
        height: Inches.

    Yields:
        The matplotlib Figure, with constrained layout.

    Raises:
        OutputError: The file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # drawn as a box, which is seen
        engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, hspace=0.04)
        figure = Figure(figsize=(width, height), dpi=DPI, layout=engine, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    _write_bytes(Path(path), content.getvalue())


def _write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def plain(text: object, limit: int = 60, *, keep_end: bool = False) -> str:
    """Text that matplotlib draws as it stands: no formulas, one line, not too long.

    Args:
        text: Anything.
        limit: Longest length in characters.
        keep_end: Whether the middle is left out where it is too long, not the end: runs differ in their last letters.

    Returns:
        The text.
    """
    line = " ".join(str(text).split())
    if len(line) > limit:
        tail = limit // 2 if keep_end else 0
        line = line[: limit - 1 - tail] + "…" + line[len(line) - tail :]
    return line.replace("$", r"\$")


def heading(figure: Any, title: str, subtitle: str = "") -> None:
    """Title and a muted line under it, above everything else.

    Args:
        figure: The figure.
        title: What is shown.
        subtitle: How to read it.
    """
    room = "\n" if subtitle else ""  # the layout keeps an empty second line free for the subtitle
    figure.suptitle(title + room, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    top = 1 - 0.42 / figure.get_size_inches()[1]
    figure.text(0.012, top, subtitle, ha="left", va="top", fontsize=9, color=MUTED)


def say(axes: Any, text: str) -> None:
    """Put a sentence where a chart would be empty.

    Args:
        axes: The axes.
        text: The sentence.
    """
    axes.set_axis_off()
    axes.text(
        0.5,
        0.5,
        text,
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=11,
        color=MUTED,
        wrap=True,
    )


def step_axis(axes: Any, first: float, last: float, *, label: bool = True) -> None:
    """Whole-numbered steps from the first to the last, with a little room.

    Args:
        axes: The axes.
        first: First step.
        last: Last step.
        label: Whether the axis is named.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    room = max(0.5, (last - first) * 0.012)
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if label:
        axes.set_xlabel(STEP_LABEL)


def log_axis(axes: Any, low: float, high: float) -> None:
    """A logarithmic y axis with plain numbers, over at least a factor of four.

    Args:
        axes: The axes.
        low: Smallest value, above 0.
        high: Largest value.
    """
    axes.set_yscale("log")
    low, high = log_limits(low, high)
    axes.set_ylim(low / 1.15, high * 1.15)
    plain_ticks(axes.yaxis, low, high)


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each power of ten where there are few powers, else at the powers.

    Args:
        axis: The x or y axis.
        low: Lower limit.
        high: Upper limit.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def log_limits(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic scale, at least a factor of four apart, so that small differences look small.

    Args:
        low: Smallest value, above 0.
        high: Largest value.

    Returns:
        The limits.
    """
    middle = math.sqrt(low) * math.sqrt(high)
    return (low, high) if high / low >= 4 else (middle / 2, middle * 2)


def segments(values: Sequence[float | None], cuts: Sequence[Any] | None = None) -> list[tuple[int, int]]:
    """Where a column is active.

    Args:
        values: One value per row, None where nothing was active.
        cuts: One mark per row; a stretch ends where the mark changes.

    Returns:
        (first, end) of each stretch of rows that have a value.
    """
    found: list[tuple[int, int]] = []
    for i, value in enumerate(values):
        if value is None:
            continue
        if found and found[-1][1] == i and (cuts is None or cuts[i] == cuts[i - 1]):
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def smooth(values: Any, window: int) -> Any:
    """Centred mean, over what there is of the window at both ends; NaN is left out.

    Args:
        values: Numbers, shape (rows,).
        window: Rows in the window; 1 changes nothing.

    Returns:
        The means, shape (rows,); NaN where the whole window is NaN.
    """
    import numpy as np

    numbers = np.asarray(values, dtype=float)
    known = np.isfinite(numbers)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, numbers, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    rows = np.arange(len(numbers))
    low, high = np.maximum(0, rows - window // 2), np.minimum(len(numbers), rows + window // 2 + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((total[high] - total[low]) / (count[high] - count[low]))


def smoothing_window(rows: int) -> int:
    """Rows that a smoothed line averages over: none below 100 rows, else about a fortieth, odd.

    Args:
        rows: Rows of the chart.
    """
    return 1 if rows < 100 else max(5, rows // 40) | 1


# -- phases -------------------------------------------------------------------------------------------------------


def open_log(source: Source) -> GradientNormLog:
    """The log that a source stands for.

    Args:
        source: A log, a run folder, or one of the gradient files.

    Returns:
        The log.

    Raises:
        DataError: There is none.
        RunError: It is damaged.
    """
    if isinstance(source, GradientNormLog):
        return source
    return load_gradient_log(source.path if isinstance(source, RunFolder) else Path(source))


def phase_spans(
    source: Source, log: GradientNormLog | None, phases: Sequence[Mapping[str, Any]] | None
) -> list[PhaseSpan]:
    """The phases to draw.

    Args:
        source: Where the chart's numbers come from.
        log: The log, where there is one: its phase column is used where the source is no run folder with a pre-flight.
        phases: Mappings with name, start_step and end_step (counted from 0, end excluded), which win where given.

    Returns:
        The spans in order.
    """
    if phases is None and not isinstance(source, GradientNormLog):
        run = source if isinstance(source, RunFolder) else RunFolder(Path(source))
        if run.path.is_dir() and run.has(RunFolder.PREFLIGHT):
            phases = run.preflight.get("phases", [])
    if phases is not None:
        return [PhaseSpan(str(p["name"]), float(p["start_step"]), float(p["end_step"])) for p in phases]
    spans: list[PhaseSpan] = []
    previous: str | None = None
    for step, name in zip(log.steps, log.phases, strict=True) if log is not None else ():
        if name is not None and name != previous:
            spans.append(PhaseSpan(name, float(step - 1), float(step)))
        elif name is not None:
            spans[-1] = PhaseSpan(name, spans[-1].start, float(step))
        previous = name
    return spans


def draw_phases(axes: Sequence[Any], spans: Sequence[PhaseSpan]) -> None:
    """A line at every boundary of all axes, and the phases' names above the first, in as many rows as they need.

    Args:
        axes: Axes with their limits set, the uppermost first.
        spans: The phases.
    """
    low, high = axes[0].get_xlim()
    shown = [s for s in spans if s.end > low and s.start < high]
    for one in axes:
        for span in shown[1:]:
            one.axvline(span.start + 0.5, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
    ends: list[float] = []
    inches = axes[0].figure.get_size_inches()[0] * 0.78
    for span in shown:
        name = plain(span.name, 28)
        left = (max(span.start + 0.5, low) - low) / (high - low)
        width = (len(name) * 0.076 + 0.16) / inches
        left = min(left, max(0.0, 1 - width))
        row = next((i for i, end in enumerate(ends) if end <= left), len(ends))
        ends[row : row + 1] = [left + width]
        axes[0].annotate(
            f"▸ {name}" if len(shown) > 1 else name, (left, 1.0), xycoords="axes fraction",
            xytext=(0, 5 + 12 * row), textcoords="offset points", fontsize=8.5, color=MUTED, annotation_clip=False,
        )  # fmt: skip
