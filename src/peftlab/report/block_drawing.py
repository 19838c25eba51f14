"""One kind of block as a drawing: norms, boxes of layers, the stream that runs past them, and where it is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftlab.report.pen import Pen

BLOCK_GAP = 16
_INNER = 384
_GUTTER, _SIDE = 40, 14
_HEADER, _NORM, _GAP = 46, 24, 14
_ADD = 36
"""Height of the place where the stream is added, with the gap below it."""
_CHIP, _CHIP_GAP, _CHIP_LEAST = 40, 6, 84
_BADGE = 16
_BOX_HEADER = 26
_CHARACTER, _BADGE_CHARACTER = 6.6, 6.0
"""Width of a letter at the size of chips; names and sizes are letters, digits and arrows."""
_ADDED = ("branch", "normed_branch", "with_residual", "with_residual_and_norm")
_TITLES = {
    "attention": "attention",
    "cross_attention": "cross attention",
    "mlp": "MLP",
    "other": "not proved",
}
_PROJECTIONS = {"query", "key", "value", "qkv", "key_value", "query_key"}
NORM_NAMES = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
"""Make of a norm to what people call it."""


@dataclass(slots=True)
class _Step:
    """One place in the stream: parts that run one after another, or side by side in lanes.

    Attributes:
        before: Norms in front that all lanes share.
        lanes: Each the norms in front of a box, and the box.
        after: Norms behind the box, inside the branch.
        residual: Whether and how the stream is added behind it; None where it is a norm alone.
    """

    before: list[Mapping[str, Any]] = field(default_factory=list)
    lanes: list[tuple[list[Mapping[str, Any]], Mapping[str, Any]]] = field(default_factory=list)
    after: list[Mapping[str, Any]] = field(default_factory=list)
    residual: str | None = None


class Block:
    """One kind of block, laid out.

    Args:
        stack: The stack it is in.
        kind: The kind, from the inspection.
        norm: What its norms are called.
    """

    def __init__(self, stack: Mapping[str, Any], kind: Mapping[str, Any], *, norm: str) -> None:
        self._stack, self._kind = stack, kind
        self.norm = NORM_NAMES.get(norm, "norm")
        self._steps = _steps(kind["parts"])
        self._lanes = max((len(step.lanes) for step in self._steps), default=1)
        self.width = float(_GUTTER + self._lanes * (_INNER + _SIDE))
        self.height = _HEADER + sum(self._step_height(step) for step in self._steps) + 8
        self.crossings: list[tuple[float, float]] = []

    @property
    def stream(self) -> float:
        """Where the stream runs, from the left."""
        return _GUTTER + (self.width - _GUTTER - _SIDE) / 2

    def draw(self, pen: Pen, left: float, top: float, *, number: int, letter: str = "") -> None:
        """Draw it.

        Args:
            pen: The pen.
            left: Where.
            top: Where.
            number: Its place among the kinds of its stack, for its colour.
            letter: Its letter where the stack has several kinds.
        """
        pen.box(left, top, self.width, self.height, "frame", round_by=10)
        name, layers = self._heading(letter)
        if letter:
            pen.square(left + _SIDE, top + 15, 10, number, name)
        pen.text(left + _SIDE + (16 if letter else 0), top + 24, name, "b")
        pen.text(left + self.width - _SIDE, top + 24, layers, "m s", anchor="end")
        y = top + _HEADER
        for number, step in enumerate(self._steps):
            last = number + 1 == len(self._steps)
            self._draw_step(pen, step, left, y, last=last)
            y += self._step_height(step)

    def _heading(self, letter: str) -> tuple[str, str]:
        """What stands above it: how often it comes, and in which layers."""
        layers = self._kind["layers"]
        name = f"{letter} " if letter else ""
        name += f"block × {len(layers)}" if len(layers) > 1 else "block"
        if self._stack["num_layers"] > self._stack["num_blocks"]:
            name += f", {self._stack['num_layers']} layers share {self._stack['num_blocks']}"
            layers = [layer for layer, block in enumerate(self._stack["order"]) if block in layers]
        note = "" if self._kind["ordered"] else " · as listed, not as run"
        return name, f"{show_layers(layers)}{note}"

    # -- heights --------------------------------------------------------------------------------------------------

    def _step_height(self, step: _Step) -> float:
        """Height of a step with the gap below it."""
        height = float((len(step.before) + len(step.after)) * (_NORM + _GAP))
        if step.lanes:
            height += max(self._lane_height(lane) for lane in step.lanes) + _GAP
        if step.residual in _ADDED:
            height += _ADD
        return height

    def _lane_height(self, lane: tuple[list[Mapping[str, Any]], Mapping[str, Any]]) -> float:
        """Height of a lane: norms and a box."""
        return len(lane[0]) * (_NORM + _GAP) + box_height(lane[1])

    # -- drawing --------------------------------------------------------------------------------------------------

    def _draw_step(self, pen: Pen, step: _Step, left: float, top: float, *, last: bool) -> None:
        """One step: norms, lanes, and the stream past them."""
        x = left + _GUTTER
        wide = self._lanes * (_INNER + _SIDE) - _SIDE
        middle = x + wide / 2
        added = step.residual in _ADDED
        y = self._draw_norms(pen, step.before, x, top, wide)
        if len(step.lanes) > 1:  # one stream into every lane
            quarter = (wide - (len(step.lanes) - 1) * _SIDE) / len(step.lanes) / 2
            pen.path(f"M{x + quarter:.1f} {y:.1f}v-6H{x + wide - quarter:.1f}v6")
        if step.lanes:
            span = (wide - (len(step.lanes) - 1) * _SIDE) / len(step.lanes)
            tall = max(self._lane_height(lane) for lane in step.lanes)
            for number, (norms, box) in enumerate(step.lanes):
                at = x + number * (span + _SIDE)
                below = self._draw_norms(pen, norms, at, y, span)
                end = self._draw_box(pen, box, at, below, span)
                if end < y + tall + _GAP or added or not last:
                    pen.line(at + span / 2, end, at + span / 2, y + tall + _GAP)
            y += tall + _GAP
            if len(step.lanes) > 1:
                pen.line(x + span / 2, y, x + wide - span / 2, y)
        y = self._draw_norms(pen, step.after, x, y, wide)
        if added:
            skip = left + _GUTTER / 2
            pen.path(f"M{middle:.1f} {top - 9:.1f}H{skip:.1f}V{y + 7:.1f}H{middle - 7:.1f}l-5 -4m5 4l-5 4")
            pen.plus(middle, y + 7)
            pen.line(middle, y + 14, middle, y + _ADD + (8 if last else 0))
        if step is self._steps[0]:
            pen.line(middle, top - _HEADER + 34, middle, top)

    def _draw_norms(
        self, pen: Pen, norms: Sequence[Mapping[str, Any]], x: float, y: float, width: float
    ) -> float:
        """Norms one under the other, each with the line below it; returns where they end."""
        for norm in norms:
            pen.pill(x, y, width, _NORM, "norm", self.norm, "", self._full(norm["path"]))
            pen.line(x + width / 2, y + _NORM, x + width / 2, y + _NORM + _GAP)
            y += _NORM + _GAP
        return y

    def _draw_box(self, pen: Pen, box: Mapping[str, Any], x: float, y: float, width: float) -> float:
        """A box of layers; returns where it ends."""
        height = box_height(box)
        kind = box["kind"]
        pen.group(self._full(box["path"]))
        pen.box(x, y, width, height, f"tint {kind}")
        pen.text(x + 12, y + 17, _title(box), "b")
        pen.text(x + width - 12, y + 17, self._note(box), "m s", anchor="end")
        pen.end()
        if kind == "cross_attention":
            self.crossings.append((x, y + height / 2))
        row_top = y + _BOX_HEADER
        for row in _rows(box["layers"]):
            at = x + 10
            badge = any(layer.get("adapted") for layer in row)
            for layer in row:
                wide = _chip_width(layer)
                self._draw_chip(pen, layer, kind, at, row_top, wide)
                at += wide + _CHIP_GAP
            row_top += _CHIP + (_BADGE if badge else 0) + _CHIP_GAP
        return y + height

    def _draw_chip(
        self, pen: Pen, layer: Mapping[str, Any], kind: str, x: float, y: float, width: float
    ) -> None:
        """One layer: its role and its sizes; a badge under it where it is adapted."""
        adapted = layer.get("adapted")
        pen.group(self._full(layer["path"]))
        height = _CHIP + (_BADGE if adapted else 0)
        if adapted:
            pen.box(x, y, width, height, f"badgebox {kind}", round_by=6)
            pen.text(x + width / 2, y + height - 4.5, adapted, "badge", anchor="middle")
        pen.box(x, y, width, _CHIP, f"chip {kind}" + (" on" if adapted else ""), round_by=6)
        pen.text(x + width / 2, y + 17, _chip_name(layer), anchor="middle")
        pen.text(x + width / 2, y + 32, _chip_size(layer), "m s", anchor="middle")
        pen.end()

    def _note(self, box: Mapping[str, Any]) -> str:
        """What stands at the right of a box."""
        notes = []
        if box["kind"] == "attention" and self._kind["causal"] is not None:
            notes.append("looks back" if self._kind["causal"] else "looks both ways")
        if box["residual"] not in _ADDED:
            notes.append("residual not proved")
        return " · ".join(notes)

    def _full(self, path: str) -> str:
        """A module's path with a star for the layer."""
        return f"{self._stack['path']}.*.{path}"


def lay_out_block(stack: Mapping[str, Any], kind: Mapping[str, Any], *, norm: str) -> Block:
    """Lay out one kind of block.

    Args:
        stack: The stack it is in, from `inspection.json`.
        kind: One of its kinds.
        norm: The make of its norms.

    Returns:
        The block, with its size.
    """
    return Block(stack, kind, norm=norm)


def show_layers(layers: Sequence[int]) -> str:
    """Layers as people write them.

    Args:
        layers: Increasing indices.

    Returns:
        E.g. "layers 0 to 11", "layers 0, 2, 4, 6 … 26".
    """
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    shown = [str(layer) for layer in layers]
    return "layers " + (", ".join(shown) if len(shown) <= 8 else f"{', '.join(shown[:6])} … {shown[-1]}")


def box_height(box: Mapping[str, Any]) -> float:
    """Height of a box with its layers.

    Args:
        box: The box.

    Returns:
        Pixels.
    """
    rows = _rows(box["layers"])
    badges = sum(any(layer.get("adapted") for layer in row) for row in rows)
    return _BOX_HEADER + len(rows) * (_CHIP + _CHIP_GAP) + badges * _BADGE + 4


def _title(box: Mapping[str, Any]) -> str:
    """What a box is called; a mixer without queries and keys is no attention."""
    roles = {layer["role"] for layer in box["layers"]}
    if box["kind"] == "attention" and not roles & _PROJECTIONS:
        return "token mixer"
    return _TITLES[box["kind"]]


def _chip_name(layer: Mapping[str, Any]) -> str:
    """What a layer is called."""
    if layer["role"] in ("unproven", "linear", "other"):
        return str(layer["path"]).rpartition(".")[2].replace("_", " ")
    return str(layer["role"]).replace("_", ", " if layer["role"] in ("key_value", "query_key") else " ")


def _chip_size(layer: Mapping[str, Any]) -> str:
    """A layer's sizes."""
    if "in" in layer:
        return f"{layer['in']:,} → {layer['out']:,}"
    return " + ".join("×".join(f"{n:,}" for n in size) for size in layer.get("sizes", ()))


def _chip_width(layer: Mapping[str, Any]) -> float:
    """Width of a chip."""
    name, size = len(_chip_name(layer)) * _CHARACTER + 10, len(_chip_size(layer)) * _CHARACTER + 14
    badge = len(layer.get("adapted") or "") * _BADGE_CHARACTER + 10
    return max(float(_CHIP_LEAST), name, size, badge)


def _rows(layers: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Layers in rows that fit into a box."""
    rows: list[list[Mapping[str, Any]]] = []
    used = 0.0
    for layer in layers:
        width = _chip_width(layer) + _CHIP_GAP
        if not rows or used + width > _INNER - 20 + _CHIP_GAP:
            rows.append([])
            used = 0.0
        rows[-1].append(layer)
        used += width
    return rows


def _steps(parts: Sequence[Mapping[str, Any]]) -> list[_Step]:
    """Parts in running order as steps of the stream.

    A norm in front of a part is in its branch where the block begins with a norm; otherwise (BERT, OPT-350m) norms are on
    the stream, behind the sum. Where a branch is normed before it is added, the norm behind its part is in it too.
    """
    pre_norm = bool(parts) and parts[0]["kind"] == "norm"
    steps: list[_Step] = []
    held: list[Mapping[str, Any]] = []
    for part in parts:
        if part["kind"] == "norm":
            box = steps[-1] if steps and steps[-1].lanes else None
            if box is not None and box.residual == "normed_branch" and not box.after and not held:
                box.after.append(part)
            elif pre_norm:
                held.append(part)
            else:
                steps.append(_Step(before=[part]))
            continue
        if part["side_by_side"] and steps and steps[-1].lanes:
            if not held:  # one norm for both lanes
                first, box_part = steps[-1].lanes[0]
                steps[-1].before += first
                steps[-1].lanes[0] = ([], box_part)
            steps[-1].lanes.append((held, part))
        else:
            steps.append(_Step(lanes=[(held, part)], residual=part["residual"]))
        held = []
    if held:
        steps.append(_Step(before=held))
    return steps
