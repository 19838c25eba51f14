"""Elements of a drawing as SVG, which takes its colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STRIP_FILLS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9")


class Pen:
    """Collects the elements of a drawing."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    @property
    def content(self) -> str:
        """Everything drawn so far."""
        return "".join(self._parts)

    def text(self, x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> None:
        """A line of text.

        Args:
            x: Where it begins, or its middle or end.
            y: Its base line.
            text: What it says.
            kind: Classes.
            anchor: start, middle or end.
        """
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str, *, round_by: float = 7) -> None:
        """A rectangle.

        Args:
            x: Left.
            y: Top.
            width: Width.
            height: Height.
            kind: Classes.
            round_by: Radius of its corners.
        """
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round_by}" class="{kind}"/>'
        )

    def path(self, shape: str, kind: str = "line") -> None:
        """A line of any shape.

        Args:
            shape: The path's data.
            kind: Classes.
        """
        self._parts.append(f'<path d="{shape}" class="{kind}"/>')

    def bar(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A filled rectangle in a colour of its own."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'
        )

    def curve(self, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> None:
        """A line through points.

        Args:
            points: Where it goes.
            colour: Its colour.
            dashed: Whether it is dashed.
        """
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="7 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        """A straight line."""
        self.path(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", kind)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        """A straight line with a head, down or to the right."""
        head = "l-4 -5m4 5l4 -5" if x1 == x2 else "l-5 -4m5 4l-5 4"
        self.path(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}{head}", kind)

    def plus(self, x: float, y: float) -> None:
        """A circle with a plus: here the stream is added."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" class="plain"/>')
        self.path(f"M{x - 4:.1f} {y:.1f}h8M{x:.1f} {y - 4:.1f}v8")

    def square(self, x: float, y: float, size: float, number: int, title: str) -> None:
        """A small square in the colour of a number."""
        fill = _STRIP_FILLS[number % len(_STRIP_FILLS)]
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}" rx="2" fill="{fill}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def group(self, title: str) -> None:
        """Begin a group that tells its title where the pointer rests; `end` ends it."""
        self._parts.append(f"<g><title>{escape(title)}</title>")

    def end(self) -> None:
        """End a group."""
        self._parts.append("</g>")

    def pill(
        self, x: float, y: float, width: float, height: float, kind: str, name: str, size: str, path: str,
        adapted: str | None = None,
    ) -> None:  # fmt: skip
        """A module in one line: its name on the left, its size on the right, its path on demand.

        Args:
            x: Left.
            y: Top.
            width: Width.
            height: Height.
            kind: Its group, for the colour; "norm" is plain.
            name: What it is called.
            size: Its sizes.
            path: Its path.
            adapted: What peft did to it; None for nothing.
        """
        self.group(path)
        shape = "plain" if kind == "norm" else f"tint {kind}" + (" on" if adapted else "")
        self.box(x, y, width, height, shape, round_by=height / 2)
        self.text(x + 16, y + height / 2 + 4, name)
        told = f"{size} · {adapted}" if adapted else size
        self.text(x + width - 16, y + height / 2 + 4, told, "m s", anchor="end")
        self.end()
