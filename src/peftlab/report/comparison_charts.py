"""Charts of several runs as SVG, so that the page of several runs is there at once, sharp at any size, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from peftlab.losses import LOSS_LABEL, Losses
from peftlab.report.page import absent
from peftlab.report.pen import Pen
from peftlab.tables import show_count

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's colours, told apart by most eyes; the eighth run begins again with a dashed line."""

_WIDTH, _LEFT, _RIGHT = 980.0, 250.0, 90.0
_BAR, _MOST_POINTS = 26.0, 400
_STYLE = (
    "<style>svg.chart{display:block;width:100%;height:auto;font-size:13px;fill:var(--ink)}"
    "svg.chart .grid{stroke:var(--line)}"
    "svg.chart .line{fill:none;stroke:var(--ink)}svg.chart .m{fill:var(--muted)}svg.chart .t{font-weight:600}"
    "svg.chart .halo{paint-order:stroke;stroke:var(--ground);stroke-width:5px}"
    "svg.chart .start{stroke:var(--ink);stroke-width:2.5;stroke-dasharray:3 2}</style>"
)

Scores = Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, Any] | None]]
"""Label, metrics before and metrics after of each run."""


def draw_scores(scores: Scores) -> str:
    """A bar for each run and metric after training, its interval, and a line where it began.

    Args:
        scores: Label, metrics before and metrics after of each run, as in `{task}_evaluation.json`.

    Returns:
        HTML.
    """
    names = list(dict.fromkeys(m for _, before, after in scores for m in [*(after or {}), *(before or {})]))
    if not names:
        return absent("none of these runs has been scored")
    pen, top = Pen(), 0.0
    for name in names:
        top = _draw_metric(pen, name, scores, top)
    told = "Bar: after training · thin line: 95 % interval over test examples · dashed: before"
    return f'<p class="muted">{told}</p>{chart(pen, top, "scores of each run")}'


def _draw_metric(pen: Pen, name: str, scores: Scores, top: float) -> float:
    """The bars of one metric; returns where the next begins."""
    parts = [part[name] for _, before, after in scores for part in (before, after) if part and name in part]
    reach: list[float] = [v for part in parts for v in (part["value"], *(part.get("interval") or ()))]
    low, high = min(0.0, *reach), max(0.0, *reach)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return _LEFT + (value - low) / span * (_WIDTH - _LEFT - _RIGHT)

    better = "higher" if parts[0]["higher_is_better"] else "lower"
    pen.text(0, top + 18, f"{name} ({parts[0]['unit']}, {better} is better)", "t")
    top += 28
    for number, (label, before, after) in enumerate(scores):
        middle = top + _BAR / 2
        pen.text(0, middle + 4, shorten(label))
        if after and name in after:
            score = after[name]
            left, right = sorted((place(0.0), place(score["value"])))
            pen.bar(left, top + 3, right - left, _BAR - 6, COLOURS[number % len(COLOURS)])
            ends = [place(v) for v in score.get("interval") or ()]
            if ends:
                whiskers = "".join(f"M{x:.1f} {middle - 4:.1f}v8" for x in ends)
                pen.path(f"M{ends[0]:.1f} {middle:.1f}H{ends[1]:.1f}{whiskers}")
            pen.text(max([right, *ends]) + 8, middle + 4, f"{score['value']:.4g}")
        else:
            pen.text(place(0.0) + 8, middle + 4, "not scored yet", "m")
        if before and name in before:
            at = place(before[name]["value"])
            pen.line(at, top, at, top + _BAR, "start")
        top += _BAR
    return top + 14


def draw_losses(runs: Sequence[tuple[str, Losses]]) -> str:
    """The losses of several runs over each other.

    Args:
        runs: Label and losses of each.

    Returns:
        HTML.
    """
    read = [(label, losses) for label, losses in runs if losses.steps or losses.validation]
    finite = [v for _, losses in read for v in (*losses.training, *losses.validation) if math.isfinite(v)]
    if not finite:
        return absent("no step has been logged yet in any of these runs")
    last = max(s for _, losses in read for s in (*losses.steps, *losses.validation_steps))
    low, high = min(0.0, *finite), _ceiling(finite)
    height, left, bottom = 360.0, 60.0, 40.0

    def place(step: float, loss: float) -> tuple[float, float]:
        y = 10 + (high - min(loss, high)) / (high - low) * (height - 10 - bottom)
        return left + step / last * (_WIDTH - left - 20), y

    pen = Pen()
    for tick in ticks(low, high):
        y = place(0, tick)[1]
        pen.line(left, y, _WIDTH - 20, y, "grid")
        pen.text(left - 8, y + 4, f"{tick:g}", "m", anchor="end")
    for tick in ticks(0, last):
        pen.text(place(tick, 0)[0], height - bottom + 20, show_count(int(tick)), "m", anchor="middle")
    pen.text(_WIDTH - 20, height - 4, "optimizer step", "m", anchor="end")
    for number, (_, losses) in enumerate(read):
        dashed = number // len(COLOURS) % 2 == 1
        colour = COLOURS[number % len(COLOURS)]
        points = [place(s, v) for s, v in _thin(losses.steps, losses.training)]
        pen.curve(points, colour, dashed=dashed)
        for step, loss in zip(losses.validation_steps, losses.validation, strict=True):
            if math.isfinite(loss):
                x, y = place(step, loss)
                pen.bar(x - 3.5, y - 3.5, 7, 7, colour)
    legend = "".join(
        f'<span style="white-space:nowrap;margin-right:18px"><b style="color:{COLOURS[i % len(COLOURS)]}">'
        f"{'- -' if i // len(COLOURS) % 2 else '—'}</b> {escape(label + _beside(losses))}</span>"
        for i, (label, losses) in enumerate(read)
    )
    told = f"{LOSS_LABEL} · line: training, mean over neighbouring steps · squares: validation"
    return f'<p class="muted">{told}</p><p style="max-width:none">{legend}</p>{chart(pen, height, "loss of each run")}'


def chart(pen: Pen, height: float, description: str) -> str:
    """A drawing as an element of the page.

    Args:
        pen: What was drawn.
        height: Its height in the drawing's own units, of which the width is 980.
        description: What it shows, for who cannot see it.

    Returns:
        HTML.
    """
    return (
        f'{_STYLE}<div class="scroll"><svg class="chart" role="img" aria-label="{description}"'
        f' viewBox="0 0 {_WIDTH:.0f} {height:.0f}" style="min-width:640px">{pen.content}</svg></div>'
    )


def shorten(label: str, most: int = 34) -> str:
    """A label without its middle where it is long: runs differ in their last letters.

    Args:
        label: The label.
        most: Letters that stay.

    Returns:
        The label, an ellipsis in it where it was cut.
    """
    return label if len(label) <= most else f"{label[: most // 3]}…{label[-(most - most // 3 - 1) :]}"


def _ceiling(values: Sequence[float]) -> float:
    """A top for the axis that a first few high losses do not flatten."""
    ordered = sorted(values)
    usual = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    return max(usual * 1.1, 1e-9)


def ticks(low: float, high: float) -> list[float]:
    """About five round values between two.

    Args:
        low: The lower end.
        high: The upper end, above it.

    Returns:
        The values, smallest first.
    """
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thin(steps: Sequence[int], losses: Sequence[float]) -> list[tuple[float, float]]:
    """Means over neighbouring steps, at most a few hundred; what is not finite is left out."""
    width = max(1, len(steps) // 40 if len(steps) >= 100 else 1, -(-len(steps) // _MOST_POINTS))
    stride = max(1, width // 4)
    points = []
    for start in range(0, len(steps), stride):
        part = [v for v in losses[start : start + width] if math.isfinite(v)]
        if part:
            points.append(
                (sum(steps[start : start + width]) / len(steps[start : start + width]), sum(part) / len(part))
            )
    return points


def _beside(losses: Losses) -> str:
    """What a run's training losses hold that another's may not."""
    return f" (training with {losses.beside})" if losses.beside else ""
