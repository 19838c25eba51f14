"""`peftlab list families`: the coverage table as it was measured last, or measured anew with `--prove`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.files import write_json, write_text
from peftlab.tables import render_text

MEASURED = Path(__file__).parents[1] / "assets" / "families.json"
"""The table that this version ships; `--prove` on a new release of transformers gives another."""

_HEADER = [
    "model type",
    "class",
    "runs",
    "outputs",
    "mixers",
    "q k v o",
    "attention",
    "mlp",
    "experts",
    "head",
    "attention maps",
    "full depth",
    "note",
]
_ABOUT = """\
Each row is a tiny random model of the library's default config, on which everything was tried. runs: it can be built and
run. outputs: what each block puts out is the model's own hidden state. mixers: a token mixer was found in every block (some
models have blocks without). q k v o: query, key, value and output layers were told apart. attention, mlp: linear layers that
these target groups stand for; experts: groups of experts held as 3-D parameters. head: the logits are the head's output, or
what is done to it. attention maps: recomputed by the probe and equal to the model's own, given by the model, or refused.
full depth: linear layers in blocks that the twin's proof leaves unproven in the library's default config as it is."""


def tell_families() -> str:
    """The table as it was measured when this version was made.

    Returns:
        Text for a terminal.
    """
    return render(json.loads(MEASURED.read_text(encoding="utf-8")))


def keep(result: Mapping[str, Any], folder: Path) -> None:
    """Write a result as `families.json` and as the page `families.md`.

    Args:
        result: What `coverage.prove_families` measured.
        folder: Where; made if needed.

    Raises:
        OutputError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "families.json", result)
    write_text(folder / "families.md", markdown(result))


def render(result: Mapping[str, Any]) -> str:
    """A result as text for a terminal.

    Args:
        result: As in `families.json`.

    Returns:
        The text.
    """
    parts = []
    for name in ("text", "vision"):
        parts.append(render_text([_HEADER, *map(_cells, result[name])], title=f"{name.upper()} MODEL TYPES"))
    counts = [
        [what, *(str(result["totals"][n].get(what, "")) for n in ("text", "vision"))]
        for what in result["totals"]["text"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(render_text([["", "text", "vision"], *counts], title=f"TOTALS ({versions})"))
    return "\n\n".join([*parts, _ABOUT])


def markdown(result: Mapping[str, Any]) -> str:
    """A result as the page `docs/families.md`.

    Args:
        result: As in `families.json`.

    Returns:
        Markdown.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# What the map is proved for",
        "",
        f"Measured by `peftlab list families --prove --output docs` with {versions}.",
        "",
        " ".join(_ABOUT.split()),
        "",
        "| | text | vision |",
        "|---|---|---|",
    ]
    for what, number in result["totals"]["text"].items():
        lines.append(f"| {what} | {number} | {result['totals']['vision'].get(what, '')} |")
    for name in ("text", "vision"):
        lines += ["", f"## {name.capitalize()}", "", _row(_HEADER), _row(["---"] * len(_HEADER))]
        lines += [_row(_cells(row)) for row in result[name]]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """One model type as cells."""
    facts = [row["runs"], row["outputs"], row["mixers"], row["attributed"]]
    counts = [row["attention"], row["mlp"], row["experts"]]
    told = [("yes" if fact else "no") if row["runs"] else "" for fact in facts[1:]]
    numbers = [str(count) if row["runs"] else "" for count in counts]
    return [
        row["model_type"],
        row["model_class"],
        "yes" if facts[0] else "no",
        *told,
        *numbers,
        row["head"],
        row["maps"][:60],
        _whole(row["whole"]) if row["runs"] else "",
        row["note"][:90],
    ]


def _whole(left: str) -> str:
    """What a whole model leaves unproven, as a cell: "none", "28 of 476", "refused"."""
    return left.partition(" linear")[0].partition(":")[0] or "none"


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
