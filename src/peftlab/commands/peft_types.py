"""`peftlab list peft_types`: every type of peft, whether it works here, and how it is chosen; and its page in the docs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.tables import render_text

PINNED = Path(__file__).parents[1] / "assets" / "peft_types.json"
"""What came of trying each type; a test tries them again and holds it current."""

_ABOUT = """\
Each type was tried on a tiny random Llama: attached, trained until every tensor was shown to train, switched off (the base's
answers), saved and put back by peftlab and by peft alone, taken off (the base, to the bit). "starts as the base": a fresh
adapter leaves the answers as they are (to 1e-5). "parameters" train on that model of width 16: compare types by them, and
nothing more. "steps": optimizer steps after which all of it was shown to train."""
_HEADER = ["type", "works", "how it is chosen", "starts as the base", "tensors", "parameters", "steps"]


def tell_types() -> str:
    """The table as text for a terminal."""
    rows = read_types()
    return "\n\n".join(
        [
            render_text(_table(rows), title=f"TYPES OF PEFT ({_share(rows)})"),
            "\n".join(f"{name}: {reason}" for name, reason in _refused(rows)),
            _ABOUT,
            "The fields of a type's config: peftlab list peft_types TYPE",
        ]
    )


def types_page() -> str:
    """The table as the page `docs/peft-types.md`."""
    rows = read_types()
    header, *body = _table(rows, quote="`")
    lines = [
        "# Types of peft",
        "",
        f"{_share(rows)}; where a type is a method here, the method does more (phases, budgets, encoders in checkpoints).",
        "",
        " ".join(_ABOUT.split()),
        "",
        "The fields of a type's config, with their defaults: `peftlab list peft_types TYPE`. A field is set with"
        " `--set method.config.FIELD=VALUE`, what is adapted with `--target`.",
        "",
        "`python tests/conformance/test_peft_types.py` tries all types anew;"
        " `peftlab list peft_types --markdown > docs/peft-types.md` makes this page.",
        "",
        _row(header),
        _row(["---"] * len(header)),
        *map(_row, body),
        "",
        "## What does not work, and why",
        "",
        *(f"- `{name}`: {reason}" for name, reason in _refused(rows)),
    ]
    return "\n".join(lines)


def read_types() -> dict[str, dict[str, Any]]:
    """What came of trying each type, by its name."""
    found: dict[str, dict[str, Any]] = json.loads(PINNED.read_text(encoding="utf-8"))
    return found


def _share(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{sum(row['works'] for row in rows.values())} of {len(rows)} work"


def _table(rows: Mapping[str, Mapping[str, Any]], *, quote: str = "") -> list[list[Any]]:
    """A row for each type."""
    table: list[list[Any]] = [_HEADER]
    for name, row in rows.items():
        if not row["works"]:
            table.append([name, "refused", "-", "-", "-", "-", "-"])
            continue
        own = row["method"] != "peft"
        chosen = f"--method {name}" if own else f"--method peft --set method.type={name}"
        starts = "yes" if row["identity"] else "no"
        sizes = [f"{row[key]:,}" for key in ("tensors", "parameters", "steps")]
        table.append([name, "yes", f"{quote}{chosen}{quote}", starts, *sizes])
    return table


def _refused(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each type that is refused, with the reason."""
    start = "peft's type '{}' does not work here: "
    return [
        (name, str(row["reason"]).removeprefix(start.format(name)))
        for name, row in rows.items()
        if not row["works"]
    ]


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
