"""Charts of base against tuned model: lines over layers, and grids whose colour is a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from peftlab.report.comparison_charts import COLOURS, chart, ticks
from peftlab.report.page import absent
from peftlab.report.pen import Pen

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 980.0, 64.0, 24.0, 14.0, 42.0
_HEIGHT = 270.0
_MOST_NUMBERS = 400
"""Cells of a grid that have their number written in them; in larger ones it comes where the pointer rests."""

Number = float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A line over layers.

    Attributes:
        label: What it is.
        values: A number for each layer; None leaves a gap.
        colour: Number of its colour.
        dashed: Whether it is dashed.
    """

    label: str
    values: Sequence[Number]
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of numbers to be seen as colours.

    Attributes:
        title: Above it.
        rows: Names of the rows, the first at the top.
        columns: Names of the columns.
        values: A number for each row and column; None is left blank.
        across: What the columns are.
        down: What the rows are.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    across: str
    down: str


def draw_lines(
    lines: Sequence[Line], layers: Sequence[int], *, name: str, bottom: float | None = None
) -> str:
    """Numbers from layer to layer.

    Args:
        lines: What is drawn.
        layers: The layers.
        name: What the numbers are.
        bottom: Where the axis begins; None where the least number is.

    Returns:
        HTML.
    """
    finite = [v for line in lines for v in line.values if v is not None and math.isfinite(v)]
    if not finite:
        return absent(f"no layer has a {name}")
    low, high = min(finite) if bottom is None else min(bottom, *finite), max(finite)
    margin = (high - low) * 0.06 or max(abs(high), 1e-9) * 0.1
    high, low = high + margin, low - (margin if bottom is None else 0.0)
    first, last = min(layers), max(layers)

    def place(layer: float, value: float) -> tuple[float, float]:
        share = (layer - first) / (last - first) if last > first else 0.5
        y = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + 12 + share * (_WIDTH - _LEFT - _RIGHT - 24), y

    pen = Pen()
    for tick in ticks(low, high):
        y = place(first, tick)[1]
        pen.line(_LEFT, y, _WIDTH - _RIGHT, y, "grid")
        pen.text(_LEFT - 8, y + 4, f"{tick:.4g}", "m", anchor="end")
    step = max(1, math.ceil(len(layers) / 24))
    for layer in layers[::step]:
        pen.text(place(layer, low)[0], _HEIGHT - _BOTTOM + 18, str(layer), "m", anchor="middle")
    pen.text(_WIDTH - _RIGHT, _HEIGHT - 6, "layer of the base", "m", anchor="end")
    for line in lines:
        colour = COLOURS[line.colour % len(COLOURS)]
        seen = [
            (a, v) for a, v in zip(layers, line.values, strict=True) if v is not None and math.isfinite(v)
        ]
        pen.curve([place(*point) for point in seen], colour, dashed=line.dashed)
        for point in seen if not line.dashed else ():
            x, y = place(*point)
            pen.bar(x - 3, y - 3, 6, 6, colour)
    told = "".join(map(_legend, lines))
    return f'<p class="muted" style="max-width:none">{escape(name)} &nbsp; {told}</p>{chart(pen, _HEIGHT, escape(name))}'


def _legend(line: Line) -> str:
    """A line's name beside its colour."""
    mark = "- -" if line.dashed else "—"
    return (
        f'<span style="white-space:nowrap;margin-right:18px"><b style="color:{COLOURS[line.colour % len(COLOURS)]}">'
        f"{mark}</b> {escape(line.label)}</span>"
    )


def draw_grids(
    grids: Sequence[Grid],
    *,
    most: float | None = None,
    own_scales: bool = False,
    show: Callable[[float], str] = lambda value: f"{value:.2f}",
) -> str:
    """Grids side by side: pale is 0, full colour the largest number.

    Args:
        grids: The grids; at most two stand beside each other.
        most: The number of full colour; None takes the largest.
        own_scales: Whether each grid has a scale of its own.
        show: A number as text.

    Returns:
        HTML.
    """
    found = [v for grid in grids for row in grid.values for v in row if v is not None and math.isfinite(v)]
    if not found:
        return absent("there is no number to be drawn")
    tops = [most or _largest([grid] if own_scales else grids) for grid in grids]
    html = ""
    for start in range(0, len(grids), 2):
        pair = grids[start : start + 2]
        pen, room = Pen(), _WIDTH / 2 if len(pair) > 1 else _WIDTH
        heights = [
            _draw_grid(pen, grid, number * room, room, tops[start + number], show)
            for number, grid in enumerate(pair)
        ]
        html += chart(pen, max(heights), escape("; ".join(grid.title for grid in pair)))
    told = " and ".join(dict.fromkeys(show(top) for top in tops))
    return f'{html}<p class="muted">Pale: 0 · full colour: {escape(told)}</p>'


def _largest(grids: Sequence[Grid]) -> float:
    """The largest number in some grids; 1 where none is above 0."""
    found = [v for grid in grids for row in grid.values for v in row if v is not None and math.isfinite(v)]
    return max([0.0, *found]) or 1.0


def _draw_grid(
    pen: Pen, grid: Grid, left: float, room: float, top: float, show: Callable[[float], str]
) -> float:
    """One grid from `left` on; returns its height."""
    margin = min(150.0, 26 + 7 * max(len(name) for name in grid.rows))
    width = min(58.0, (room - margin - 14) / len(grid.columns))
    height = max(9.0, min(24.0, 520 / len(grid.rows)))
    begin_x, begin_y = left + margin, 46.0
    pen.text(begin_x, 16, grid.title, "t")
    written = len(grid.rows) * len(grid.columns) <= _MOST_NUMBERS and width >= 30 and height >= 15
    every = max(1, math.ceil(26 / width))
    for place, name in enumerate(grid.columns):
        if place % every == 0:
            pen.text(begin_x + (place + 0.5) * width, begin_y - 6, name, "m", anchor="middle")
    steps = max(1, math.ceil(14 / height))
    for number, name in enumerate(grid.rows):
        y = begin_y + number * height
        if number % steps == 0:
            pen.text(begin_x - 7, y + height / 2 + 4, name, "m", anchor="end")
        for place, value in enumerate(grid.values[number]):
            x = begin_x + place * width
            told = "not there" if value is None else show(value)
            pen.group(f"{grid.down} {name}, {grid.across} {grid.columns[place]}: {told}")
            share = 0.0 if value is None else max(0.0, min(1.0, value / top))
            pen.bar(x + 0.5, y + 0.5, width - 1, height - 1, f"rgba(0,114,178,{0.04 + 0.96 * share:.3f})")
            if written and value is not None:
                kind = "on" if share > 0.55 else ""
                pen.text(x + width / 2, y + height / 2 + 4, told, f"c {kind}", anchor="middle")
            pen.end()
    end = begin_y + len(grid.rows) * height
    pen.text(begin_x, end + 18, f"↓ {grid.down} · → {grid.across}", "m")
    return end + 28


GRID_STYLE = "<style>svg.chart .c{font-size:11px}svg.chart .on{fill:#fff}</style>"
"""For the numbers in the cells; once on a page."""
