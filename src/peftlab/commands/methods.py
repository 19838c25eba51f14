"""`peftlab list methods --prove`: which methods work on which models, as text and as the page `docs/methods.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.files import write_json, write_text
from peftlab.tables import render_text

MEASURED = Path(__file__).parents[1] / "assets" / "methods.json"
"""The table that this version ships; `--prove` on a new release of peft gives another."""

_ABOUT = """\
Each cell is a method with its default settings on a tiny random model: attached, trained until every tensor was shown to
train, switched off (the base's answers, to the bit), saved and put back, removed (the base, to the bit). The number is what
it trains, in per cent of that tiny base, so that methods can be compared and nothing more; = marks a fresh adapter that
leaves the answers as they are. What cannot be is refused with a reason."""


def keep(result: Mapping[str, Any], folder: Path) -> None:
    """Write a result as `methods.json` and as the page `methods.md`.

    Args:
        result: What `capabilities.prove_methods` found.
        folder: Where; made if needed.

    Raises:
        OutputError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "methods.json", result)
    write_text(folder / "methods.md", markdown(result))


def render(result: Mapping[str, Any]) -> str:
    """A result as text for a terminal.

    Args:
        result: As in `methods.json`.

    Returns:
        The text.
    """
    table = render_text(_table(result), title=f"METHODS ON TINY MODELS ({_versions(result)})")
    return "\n\n".join([table, "\n".join(_reasons(result)), _ABOUT])


def markdown(result: Mapping[str, Any]) -> str:
    """A result as the page `docs/methods.md`.

    Args:
        result: As in `methods.json`.

    Returns:
        Markdown.
    """
    header, *rows = _table(result)
    lines = [
        "# Which methods work on which models",
        "",
        f"Tried by `peftlab list methods --prove --output docs` with {_versions(result)}.",
        "",
        " ".join(_ABOUT.split()),
        "",
        _row(header),
        _row(["---"] * len(header)),
        *map(_row, rows),
        "",
        *(f"- {line}" for line in _reasons(result)),
    ]
    return "\n".join(lines) + "\n"


def _versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def _table(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model, a column for each method."""
    cells = {(c["model_type"], c["head"], c["method"]): c for c in result["cells"]}
    models = list(dict.fromkeys((c["model_type"], c["head"]) for c in result["cells"]))
    methods = list(dict.fromkeys(c["method"] for c in result["cells"]))
    rows = [[f"{name}, {head}", *(_cell(cells[name, head, m]) for m in methods)] for name, head in models]
    return [["model, task", *methods], *rows]


def _cell(cell: Mapping[str, Any]) -> str:
    """One cell: a share and whether it starts as the base, or the verdict."""
    if cell["verdict"] != "works":
        return str(cell["verdict"])
    return f"{cell['parameters'] / cell['base_parameters']:.1%}{' =' if cell['identity'] else ''}"


def _reasons(result: Mapping[str, Any]) -> list[str]:
    """Why cells do not work, equal reasons together."""
    found: dict[str, list[str]] = {}
    for cell in result["cells"]:
        if cell["verdict"] != "works":
            said = cell["reason"].partition("; groups:")[0]
            found.setdefault(f"{cell['verdict']}: {said}", []).append(
                f"{cell['method']} on {cell['model_type']}"
            )
    return [f"{', '.join(where)}: {reason}" for reason, where in found.items()]


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
