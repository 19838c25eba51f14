"""A model's map as a drawing: stacks of blocks, each kind of block once, the parts in it in the order they run.

The drawing is SVG inside the page. It takes its colours from the page, so that it is right in light and dark, and tells the
full path of every module where the pointer rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from peftlab.report.block_drawing import BLOCK_GAP, Block, lay_out_block
from peftlab.report.pen import Pen

_COLUMN_GAP = 76
_PILL, _GAP, _MARGIN = 30, 20, 8
_STRIP = 9
_LEAST_PILL = 280
_STYLE = """
.map{display:block;max-width:100%;height:auto;margin:14px 0;font-size:12px;color:var(--ink)}
.map text{fill:var(--ink)}
.map .m{fill:var(--muted)}
.map .s{font-size:10.5px}
.map .b{font-weight:600}
.map .line{fill:none;stroke:var(--muted);stroke-width:1.3}
.map .cross{fill:none;stroke:var(--accent);stroke-width:1.6}
.map .frame{fill:var(--soft);stroke:var(--line)}
.map .plain{fill:var(--ground);stroke:var(--line)}
.map .tint{stroke-width:1;fill-opacity:.1;stroke-opacity:.5}
.map .chip{fill:var(--ground);stroke-opacity:.45}
.map .on{stroke-width:2.2;stroke-opacity:1}
.map .attention,.map .cross_attention{fill:var(--accent);stroke:var(--accent)}
.map .mlp{fill:var(--warm);stroke:var(--warm)}
.map .embed{fill:#009e73;stroke:#009e73}
.map .head{fill:#cc79a7;stroke:#cc79a7}
.map .other{fill:var(--muted);stroke:var(--muted)}
.map .chip.attention,.map .chip.cross_attention,.map .chip.mlp,.map .chip.other{fill:var(--ground)}
.map text.badge{fill:var(--ground);font-size:10px;font-weight:600}
.map .badgebox{stroke:none}
"""


def draw_model(document: Mapping[str, Any]) -> str:
    """The drawing of one model.

    Args:
        document: The content of `inspection.json`.

    Returns:
        An `<svg>` element.
    """
    pen = Pen()
    columns = _columns(document)
    shared = [p for p in document["map"]["embeddings"] if _column_of(p["path"], columns) is None]
    top = float(_MARGIN)
    if len(columns) > 1 and shared:
        top = _pills(pen, shared, "embed", _MARGIN, sum(c.width for c in columns) + _COLUMN_GAP, top) + _GAP
    bottoms = []
    left = float(_MARGIN)
    for number, column in enumerate(columns):
        embeddings = [p for p in document["map"]["embeddings"] if _column_of(p["path"], columns) is column]
        column.left = left
        if len(columns) > 1 and shared:
            pen.arrow(column.middle, top - _GAP, column.middle, top)
        column.bottom = _draw_column(pen, column, document, embeddings, columns, top)
        bottoms.append(column.bottom)
        left += column.width + (_COLUMN_GAP if number + 1 < len(columns) else 0)
    if len(columns) == 2 and columns[1].crossings:
        _draw_crossing(pen, columns[0], columns[1])
    bottom = _draw_head(pen, document, columns, max(bottoms))
    width, height = left + _MARGIN, bottom + _MARGIN
    name = escape(f"Drawing of the model {document['name']}")
    return (
        f'<svg class="map" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{name}">'
        f"<style>{_STYLE}</style>{pen.content}</svg>"
    )


class _Column:
    """One stack and what belongs to it."""

    def __init__(self, stack: Mapping[str, Any], tower: str, blocks: Sequence[Block]) -> None:
        self.stack, self.tower, self.blocks = stack, tower, blocks
        self.width = max((block.width for block in blocks), default=400.0)
        self.left = self.bottom = 0.0
        self.crossings: list[tuple[float, float]] = []

    @property
    def middle(self) -> float:
        """Where its stream runs down."""
        return self.left + (self.blocks[0].stream if self.blocks else self.width / 2)


def _columns(document: Mapping[str, Any]) -> list[_Column]:
    """The stacks side by side."""
    stacks = document["map"]["stacks"]
    norm = str(document["facts"].get("norm") or "norm")
    paths = [stack["path"].split(".") for stack in stacks]
    columns = []
    for stack, path in zip(stacks, paths, strict=True):
        same = min(
            (_common(path, other) for other in paths if other is not path), default=-1
        )  # the first component in which the stacks differ names the tower
        tower = ".".join(path[: same + 1]) + "." if same >= 0 else ""
        blocks = [lay_out_block(stack, kind, norm=norm) for kind in stack["kinds"]]
        columns.append(_Column(stack, tower, blocks))
    return columns


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many components two paths begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _column_of(path: str, columns: Sequence[_Column]) -> _Column | None:
    """The column that a module outside the blocks belongs to; None where it serves several."""
    return next((column for column in columns if path.startswith(column.tower)), None)


def _draw_column(
    pen: Pen,
    column: _Column,
    document: Mapping[str, Any],
    embeddings: Sequence[Mapping[str, Any]],
    columns: Sequence[_Column],
    top: float,
) -> float:
    """Draw one stack from its embeddings to its last norm; returns where it ends."""
    around = [p for p in document["map"]["after"] if _column_of(p["path"], columns) is column]
    first = [p for p in around if p["role"] == "norm" and "emb" in p["path"].lower()]
    last = [p for p in around if p not in first and _is_final(p, column)]
    norm = column.blocks[0].norm if column.blocks else "norm"
    first = [part | {"called": norm} for part in first]
    for parts, group in ((embeddings, "embed"), (first, "norm")):
        if parts:
            top = _pills(pen, parts, group, column.left, column.width, top)
            pen.arrow(column.middle, top, column.middle, top + _GAP)
            top += _GAP
    if len(columns) > 1 or len(column.blocks) > 1:
        top = _draw_strip(pen, column, top)
    in_turn = all(_is_run(kind["layers"]) for kind in column.stack["kinds"])
    for number, block in enumerate(column.blocks):
        block.draw(
            pen,
            column.left + (column.width - block.width) / 2,
            top,
            number=number,
            letter=_letter(column, number),
        )
        column.crossings += block.crossings
        top += block.height
        if number + 1 < len(column.blocks):
            if in_turn:
                pen.line(column.middle, top, column.middle, top + BLOCK_GAP)
            top += BLOCK_GAP
    if last:
        pen.arrow(column.middle, top, column.middle, top + _GAP)
        last = [part | {"called": f"final {norm}"} for part in last]
        top = _pills(pen, last, "norm", column.left, column.width, top + _GAP)
    return top


def _is_run(layers: Sequence[int]) -> bool:
    """Whether layers follow each other without a gap."""
    return list(layers) == list(range(layers[0], layers[-1] + 1))


def _is_final(part: Mapping[str, Any], column: _Column) -> bool:
    """Whether a module is the norm behind a stack's last block."""
    norm = column.stack["final_norm"]
    return norm is not None and (part["path"] == norm or part["path"].endswith(f".{norm}"))


def _letter(column: _Column, number: int) -> str:
    """The letter of a kind of block; "" where there is only one."""
    return chr(ord("A") + number % 26) if len(column.blocks) > 1 else ""


def _draw_strip(pen: Pen, column: _Column, top: float) -> float:
    """The stack's name, and where there are several kinds of block one square for each layer."""
    pen.text(column.left, top + 12, column.stack["name"], "b")
    if len(column.blocks) == 1:
        return top + 20
    kind_of = {layer: number for number, kind in enumerate(column.stack["kinds"]) for layer in kind["layers"]}
    per_row = max(1, int((column.width - 4) / (_STRIP + 3)))
    for place, layer in enumerate(sorted(kind_of)):
        x = column.left + (place % per_row) * (_STRIP + 3)
        y = top + 20 + (place // per_row) * (_STRIP + 3)
        letter = _letter(column, kind_of[layer])
        pen.square(x, y, _STRIP, kind_of[layer], f"layer {layer}: {letter}")
    rows = (len(kind_of) - 1) // per_row + 1
    return top + 20 + rows * (_STRIP + 3) + 8


def _pills(
    pen: Pen, parts: Sequence[Mapping[str, Any]], group: str, left: float, width: float, top: float
) -> float:
    """Modules outside the blocks, one under the other; returns where they end."""
    for number, part in enumerate(parts):
        size = " × ".join(f"{n:,}" for n in part["size"])
        pen.pill(left, top, width, _PILL, group, _called(part), size, part["path"], part["adapted"])
        top += _PILL + (6 if number + 1 < len(parts) else 0)
    return top


def _grid(pen: Pen, parts: Sequence[Mapping[str, Any]], left: float, width: float, top: float) -> float:
    """Modules outside the blocks, several in a row; returns where they end."""
    across = min(len(parts), max(1, int(width // _LEAST_PILL)))
    span = (width - 8 * (across - 1)) / across
    for start in range(0, len(parts), across):
        for place, part in enumerate(parts[start : start + across]):
            bottom = _pills(pen, [part], "other", left + place * (span + 8), span, top)
        top = bottom + 6
    return top - 6


def _called(part: Mapping[str, Any]) -> str:
    """What a module outside the blocks is called."""
    if "called" in part:
        return str(part["called"])
    if part["role"] == "embedding":
        return "token embedding"
    names = [name for name in str(part["path"]).split(".") if not name.isdigit()]
    return " ".join(names[-1:] if part["role"] == "embedding.other" else names[-2:]).replace("_", " ")


def _draw_crossing(pen: Pen, source: _Column, target: _Column) -> None:
    """The line from the end of an encoder to the cross attention of its decoder."""
    between = source.left + source.width + _COLUMN_GAP / 2
    pen.path(
        f"M{source.middle:.1f} {source.bottom:.1f}V{source.bottom + 16:.1f}H{between:.1f}"
        f"V{target.crossings[0][1]:.1f}",
        "cross",
    )
    for x, y in target.crossings:
        pen.arrow(between, y, x, y, "cross")
    pen.text(source.middle + 6, source.bottom + 12, "keys and values", "m s")


def _draw_head(pen: Pen, document: Mapping[str, Any], columns: Sequence[_Column], bottom: float) -> float:
    """The head under the last stack, and what else lies outside; returns where the drawing ends."""
    drawn = document["map"]
    head, column = drawn["head"], columns[-1]
    top = column.bottom
    if head is not None:
        pen.arrow(column.middle, top, column.middle, top + _GAP)
        size = " × ".join(f"{n:,}" for n in head["size"])
        text = f"{size} · tied to the token embedding" if drawn["tied"] else size
        pen.pill(
            column.left, top + _GAP, column.width, _PILL, "head", "head", text, head["path"], head["adapted"]
        )
        top += _GAP + _PILL
    finals = [p["path"] for p in drawn["after"] if any(_is_final(p, c) for c in columns)]
    others = [
        p for p in drawn["after"]
        if p["path"] not in finals and not (p["role"] == "norm" and "emb" in p["path"].lower())
    ]  # fmt: skip
    bottom = max(bottom, top)
    if others:
        width = columns[-1].left + columns[-1].width - columns[0].left
        pen.text(columns[0].left, bottom + 30, "also outside the stacks", "m s")
        bottom = _grid(pen, others, columns[0].left, width, bottom + 38)
    return bottom
