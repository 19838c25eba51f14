"""What a better score costs: arms or runs as points, and which of them nothing beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftlab.report.comparison_charts import COLOURS, chart, shorten, ticks
from peftlab.report.page import absent
from peftlab.report.pen import Pen

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 980.0, 380.0, 64.0, 48.0, 24.0


@dataclass(frozen=True, slots=True)
class Point:
    """One thing with its cost and its score.

    Attributes:
        label: What it is.
        cost: What it costs, above 0; less is better.
        score: What it came to.
        interval: 95 % interval of the score, or None.
    """

    label: str
    cost: float
    score: float
    interval: tuple[float, float] | None = None


def pareto_front(points: Sequence[Point], *, higher_is_better: bool = True) -> list[Point]:
    """The points that no other beats: none is at least as good in both and better in one.

    Args:
        points: The points.
        higher_is_better: The score's direction.

    Returns:
        Them, cheapest first; points that are equal in both stay together.

    Example:
        >>> [p.label for p in pareto_front([Point("a", 1, 5), Point("b", 2, 4), Point("c", 3, 9)])]
        ['a', 'c']
    """
    sign = 1 if higher_is_better else -1

    def beats(one: Point, other: Point) -> bool:
        least = one.cost <= other.cost and sign * one.score >= sign * other.score
        return least and (one.cost < other.cost or sign * one.score > sign * other.score)

    kept = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda point: point.cost)


def draw_pareto(
    points: Sequence[Point],
    *,
    cost: str,
    score: str,
    show_cost: Callable[[float], str],
    higher_is_better: bool = True,
) -> str:
    """Cost against score, the front joined by a line; the cost's axis is logarithmic where it spans a factor of three.

    Args:
        points: The points; costs above 0.
        cost: What the axis is called.
        score: What the other one is called.
        show_cost: A cost as text.
        higher_is_better: The score's direction.

    Returns:
        HTML.
    """
    usable = [p for p in points if p.cost > 0 and math.isfinite(p.score)]
    if len(usable) < 2:
        return absent("two scored runs are needed to weigh cost against score")
    reach = [v for p in usable for v in (p.score, *(p.interval or ()))]
    low, high = min(reach), max(reach)
    margin = (high - low) * 0.08 or max(abs(high), 1.0) * 0.05
    low, high = low - margin, high + margin
    costs = [p.cost for p in usable]
    is_wide = max(costs) >= 3 * min(costs)
    bend = math.log10 if is_wide else float
    left, right = bend(min(costs)), bend(max(costs))
    room = (right - left) * 0.1 or abs(right) * 0.1 or 0.3
    left, right = left - room, right + room

    def place(value: float, height: float) -> tuple[float, float]:
        x = _LEFT + (bend(value) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return x, 12 + (high - height) / (high - low) * (_HEIGHT - 12 - _BOTTOM)

    pen = Pen()
    for tick in ticks(low, high):
        y = place(usable[0].cost, tick)[1]
        pen.line(_LEFT, y, _WIDTH - _RIGHT, y, "grid")
        pen.text(_LEFT - 8, y + 4, f"{tick:g}", "m", anchor="end")
    for value in _decades(left, right) if is_wide else ticks(left, right):
        x = place(value, low)[0]
        pen.line(x, 12, x, _HEIGHT - _BOTTOM, "grid")
        pen.text(x, _HEIGHT - _BOTTOM + 18, show_cost(value), "m", anchor="middle")
    front = pareto_front(usable, higher_is_better=higher_is_better)
    pen.curve([place(p.cost, p.score) for p in front], "var(--muted)", dashed=True)
    taken: list[tuple[float, float]] = []
    for number, point in enumerate(usable):
        x, y = place(point.cost, point.score)
        if point.interval:
            ends = [place(point.cost, v)[1] for v in point.interval]
            pen.path(
                f"M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}M{x - 4:.1f} {ends[0]:.1f}h8M{x - 4:.1f} {ends[1]:.1f}h8"
            )
        pen.bar(x - 5, y - 5, 10, 10, COLOURS[number % len(COLOURS)])
        _label(pen, point, x, y, taken, on_front=point in front)
    pen.text(_WIDTH - _RIGHT, _HEIGHT - 8, cost + (", logarithmic" if is_wide else ""), "m", anchor="end")
    direction = "higher" if higher_is_better else "lower"
    told = f"{score}, {direction} is better · bold and joined: beaten by none in both · lines: 95 % interval"
    return f'<p class="muted">{told}</p>{chart(pen, _HEIGHT, f"{score} against {cost}")}'


def _label(
    pen: Pen, point: Point, x: float, y: float, taken: list[tuple[float, float]], *, on_front: bool
) -> None:
    """A point's name beside it, moved down where another's name is."""
    at, end = y - 9, x > _WIDTH * 0.72
    side = x - 9 if end else x + 9
    while any(abs(at - b) < 14 and abs(side - a) < 150 for a, b in taken):
        at += 14
    taken.append((side, at))
    pen.text(
        side, at, shorten(point.label), "halo t" if on_front else "halo", anchor="end" if end else "start"
    )


def _decades(left: float, right: float) -> list[float]:
    """Costs for the axis: powers of ten and, where there are few, twos and fives."""
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [s * 10.0**p for p in range(math.floor(left), math.ceil(right) + 1) for s in steps]
        inside = [v for v in found if left <= math.log10(v) <= right]
        if len(inside) >= 3:
            return inside
    return inside
