"""Tables in plain text and HTML, numbers as people read them, and the pre-flight as text.

A table is rows of cells; the first row is its header. Numbers that are already text ("1,234", "36.0 [34.5, 37.9]", "12 s")
are set to the right, and so are real numbers; everything else to the left.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_NUMBER = re.compile(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?\s*(%|s|min|h|(?:[KMGT]i)?B|\[[^\]]*\])?|-|–")
_KINDS = {"lora": "LoRA", "new_layer": "new layers", "whole": "heads or embeddings, whole"}
"""What the kinds of a pre-flight's parameters are called."""
_NUMBER_CELL = ' class="n" style="text-align:right"'

Rows = Sequence[Sequence[Any]]


def render_text(rows: Rows, *, title: str = "") -> str:
    """A table as plain text.

    Args:
        rows: Header and rows; None is an empty cell, short rows are filled up.
        title: A line above.

    Returns:
        The table, without a line end after its last line.

    Example:
        >>> print(render_text([["run", "bleu"], ["a", 36.04], ["long name", 7.5]]))
        run         bleu
        ---------  -----
        a          36.04
        long name    7.5
    """
    cells = _cells(rows)
    if not cells:
        return title
    right = _right(cells)
    widths = [max(_width(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            " " * (w - _width(c)) + c if r else c + " " * (w - _width(c))
            for c, w, r in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join([title, *lines] if title else lines)


def render_html(rows: Rows, *, caption: str = "") -> str:
    """A table as HTML; every cell is escaped.

    Args:
        rows: Header and rows, as for `render_text`.
        caption: The table's caption.

    Returns:
        A `<table>` element; cells of number columns have the class "n".
    """
    cells = _cells(rows)
    if not cells:
        return ""
    right = _right(cells)
    head, *body = (
        "<tr>"
        + "".join(
            f"<{tag}{_NUMBER_CELL if r else ''}>{escape(cell)}</{tag}>"
            for cell, r in zip(row, right, strict=True)
        )
        + "</tr>"
        for tag, row in zip(["th", *["td"] * (len(cells) - 1)], cells, strict=True)
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _cells(rows: Rows) -> list[list[str]]:
    """All cells as text, all rows equally long."""
    columns = max((len(row) for row in rows), default=0)
    return [[_cell(cell) for cell in row] + [""] * (columns - len(row)) for row in rows]


def _cell(value: Any) -> str:
    """One cell as one line of text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _right(cells: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold only numbers."""
    columns = zip(*cells[1:], strict=True) if len(cells) > 1 else ([] for _ in cells[0])
    found = [[cell for cell in column if cell] for column in columns]
    return [bool(column) and all(_NUMBER.fullmatch(cell) for cell in column) for column in found]


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


# -- numbers as people read them ----------------------------------------------------------------------------------


def show_count(value: int | None, *, of: int | None = None) -> str:
    """A count, with its share of another.

    Args:
        value: The count; None gives "-".
        of: The whole.

    Returns:
        E.g. "294,912 (0.22 %)".
    """
    if value is None:
        return "-"
    return f"{value:,}" + (f" ({100 * value / of:.3g} %)" if of else "")


def show_bytes(value: float | None) -> str:
    """Bytes in the binary unit that fits.

    Args:
        value: Bytes; None gives "-".

    Returns:
        E.g. "812 MiB".
    """
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def show_seconds(value: float | None) -> str:
    """A duration.

    Args:
        value: Seconds; None gives "-".

    Returns:
        E.g. "8.3 s", "4 min 07 s", "2 h 05 min".
    """
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def show_score(score: Mapping[str, Any] | None) -> str:
    """A score with its interval.

    Args:
        score: As in `{task}_evaluation.json`; None gives "-".

    Returns:
        E.g. "36.04 [34.51, 37.92]"; rates have three decimals.
    """
    if score is None:
        return "-"
    digits = 3 if score["unit"] == "rate" else 2
    interval = score.get("interval")
    span = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{score['value']:.{digits}f}{span}"


# -- pre-flight ---------------------------------------------------------------------------------------------------


def preflight_rows(preflight: Mapping[str, Any]) -> list[list[Any]]:
    """The splits of a pre-flight as a table.

    Args:
        preflight: The content of `preflight.json`.

    Returns:
        Header and one row per split; a split of which only the size is known has that.
    """
    rows: list[list[Any]] = [["split", "read", "kept", "cut", "dropped"]]
    for split, found in preflight["rows"].items():
        if not isinstance(found, Mapping):
            rows.append([split, None, found, None, ""])
            continue
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in found["dropped"].items() if count)
        rows.append([split, found["read"], found["kept"], found["truncated"], dropped or "none"])
    return rows


def phase_rows(phases: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The phases of a pre-flight or a summary as a table.

    Args:
        phases: Their mappings.

    Returns:
        Header and one row per phase; steps are counted from 1 and both ends are included.
    """
    header = ["phase", "steps", "trains", "tensors", "parameters"]
    return [
        header,
        *(
            [
                phase["name"],
                f"{phase['start_step'] + 1:,} to {phase['end_step']:,}",
                show_groups(phase),
                phase["trainable_tensors"],
                phase["trainable_parameters"],
            ]
            for phase in phases
        ),
    ]


def adapter_rows(adapters: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The adapters of a pre-flight as a table, each kind of what one trains in a row of its own.

    Args:
        adapters: Their mappings.

    Returns:
        Header and rows.
    """
    rows: list[list[Any]] = [["adapter", "method", "type in peft", "trains", "parameters"]]
    for number, adapter in enumerate(adapters):
        where = "whole model" if adapter["scope"] == "model" else adapter["scope"]
        first = [
            f"{number}: {where}" if len(adapters) > 1 else where,
            adapter["method"],
            adapter["peft_type"] or "-",
        ]
        for place, (kind, parameters) in enumerate(adapter["kinds"].items()):
            rows.append([*(first if place == 0 else [None] * 3), _KINDS.get(kind, kind), parameters])
        if len(adapter["kinds"]) > 1:
            rows.append([None, None, None, "together", adapter["parameters"]])
    return rows


def show_groups(phase: Mapping[str, Any]) -> str:
    """What a phase trains, in words.

    Args:
        phase: Its mapping; "layers" may be absent, None, a half's name or [first, last].

    Returns:
        E.g. "attention, mlp in layers 0 to 10".
    """
    groups, layers = ", ".join(phase["groups"]), phase.get("layers")
    if not layers:
        return groups
    where = f"{layers} half" if isinstance(layers, str) else f"layers {layers[0]} to {layers[-1]}"
    return f"{groups} in {where}"


def render_preflight(preflight: Mapping[str, Any]) -> str:
    """What a run is about to do, for a person.

    Args:
        preflight: The content of `preflight.json`.

    Returns:
        Several lines of text.
    """
    steps, tokens, parameters = preflight["steps"], preflight["tokens"], preflight["parameters"]
    share = show_count(parameters["trainable"], of=parameters["total"])
    lines = [
        f"task {preflight['task']}",
        *_what_is_tuned(preflight),
        "",
        render_text(preflight_rows(preflight)),
        "",
        f"{tokens['train']:,} training tokens, {100 * tokens['labelled_share']:.3g} % of them labelled;"
        f" the longest row has {tokens['longest']:,}",
        f"{steps['total']:,} steps, {steps['per_epoch']:,} per epoch: {steps['epochs']:.3g} epochs",
        f"{share} of {parameters['total']:,} parameters can be trained",
        "",
        render_text(phase_rows(preflight["phases"])),
    ]
    if preflight.get("notes"):
        lines += ["", *(f"note: {note}" for note in preflight["notes"])]
    return "\n".join(lines)


def _what_is_tuned(preflight: Mapping[str, Any]) -> list[str]:
    """The base and the adapters; nothing for a pre-flight that an older version wrote."""
    if "model" not in preflight:
        return []
    model, total = preflight["model"], preflight["parameters"]["total"]
    base = f"base {model['name']} ({model['class']}, {model['head']}), {total:,} parameters"
    return [base, "", render_text(adapter_rows(preflight["adapters"]))]
