"""`peftlab list methods --prove`: which methods work on which models, as text and as the page `docs/methods.md`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.files import write_json, write_text
from peftlab.tables import render_text

MEASURED = Path(__file__).parents[1] / "assets" / "methods.json"
"""The table that this version ships; `--prove` on a new release of peft gives another."""

_ABOUT = """\
Each cell is a method with its default settings on a tiny random model: attached, trained until every tensor was shown to
train, switched off (the base's answers, to the bit), saved and put back, removed (the base, to the bit). What cannot be is
refused with a reason."""
_SHARES = """\
Parameters that train, in per cent of that tiny base, so that methods can be compared and nothing more; = marks a fresh
adapter that leaves the answers as they are (to 1e-5)."""
PROPERTIES: dict[str, tuple[str, str]] = {
    "count": (
        "Parameters by the paper's formula",
        "As many parameters train as the formula of the paper gives, computed from the shapes of the bare model.",
    ),
    "accumulation": (
        "Gradient accumulation",
        "A step over two batches of two rows has the loss and the gradients of a step over one batch of four (1e-6 of the"
        " largest, float64, no dropout), with unequally many labels in the rows.",
    ),
    "padding": (
        "Padding",
        "A row that pads fill up beside a longer one has the logits, the loss and the gradients that it has alone (1e-6 of"
        " the largest, float64, no dropout).",
    ),
    "bf16": (
        "A base in bfloat16",
        "Twenty steps with learning rate 2e-4 move every tensor of the adapter (nine in ten of the values that have a"
        " gradient at least), all values stay finite, and the base comes back to the bit.",
    ),
    "checkpointing": (
        "Gradient checkpointing",
        "With it the last block computes twice and the gradients are the same (1e-6 of the largest, float64, no dropout).",
    ),
    "generation": (
        "Generation",
        "With an adapter off its start, greedy tokens are the same with a cache, without one, and as one pass over prompt"
        " and answer predicts them. Prefix tuning stands in the cache and refuses to generate without.",
    ),
    "resume": (
        "Resume",
        "Adapter and optimizer, put back after step 4 of 6 on a freshly attached model, end with the bits of a run that went"
        " through, dropout on.",
    ),
    "phases": (
        "Phases",
        "Three steps of attention alone, three of the MLP alone: each shown to train while the other stands still.",
    ),
    "merge": (
        "Merge",
        "The merged base answers as the adapted model did (1e-10, float64), has only the base's classes, and is the same"
        " once transformers has saved and loaded it; merging again and removing are refused.",
    ),
}
"""The properties of a cell: what each is called, and what was shown where it works."""


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
    parts = [
        render_text(_table(result, _verdict), title=f"METHODS ON TINY MODELS ({_versions(result)})"),
        "\n".join(_reasons(result)),
        _ABOUT,
        render_text(_table(result, _share), title="WHAT TRAINS"),
        _SHARES,
    ]
    for name, (title, shown) in PROPERTIES.items():
        parts += [render_text(_table(result, _property(name)), title=title.upper()), shown]
        parts += ["\n".join(_reasons(result, name))] if _reasons(result, name) else []
    return "\n\n".join(parts)


def markdown(result: Mapping[str, Any]) -> str:
    """A result as the page `docs/methods.md`.

    Args:
        result: As in `methods.json`.

    Returns:
        Markdown.
    """
    lines = [
        "# Which methods work on which models",
        "",
        f"Tried by `peftlab list methods --prove --output docs` with {_versions(result)}.",
        "",
        " ".join(_ABOUT.split()),
        *_section(_table(result, _verdict), _reasons(result)),
        "",
        "## What trains",
        "",
        " ".join(_SHARES.split()),
        *_section(_table(result, _share), []),
    ]
    for name, (title, shown) in PROPERTIES.items():
        lines += ["", f"## {title}", "", shown]
        lines += _section(_table(result, _property(name)), _reasons(result, name))
    return "\n".join(lines) + "\n"


def _section(table: Sequence[Sequence[str]], reasons: Sequence[str]) -> list[str]:
    """A table in Markdown, and the reasons below it."""
    header, *rows = table
    lines = ["", _row(header), _row(["---"] * len(header)), *map(_row, rows)]
    return [*lines, "", *(f"- {line}" for line in reasons)] if reasons else lines


def _versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def _table(result: Mapping[str, Any], show: Any) -> list[list[str]]:
    """A row for each model, a column for each method."""
    cells = {(c["model_type"], c["head"], c["method"]): c for c in result["cells"]}
    models = list(dict.fromkeys((c["model_type"], c["head"]) for c in result["cells"]))
    methods = list(dict.fromkeys(c["method"] for c in result["cells"]))
    rows = [[f"{name}, {head}", *(show(cells[name, head, m]) for m in methods)] for name, head in models]
    return [["model, task", *methods], *rows]


def _verdict(cell: Mapping[str, Any]) -> str:
    return str(cell["verdict"])


def _share(cell: Mapping[str, Any]) -> str:
    """What a method trains as a share of the base, and whether it starts as the base."""
    if cell["verdict"] != "works":
        return "-"
    return f"{cell['parameters'] / cell['base_parameters']:.1%}{' =' if cell['identity'] else ''}"


def _property(name: str) -> Any:
    """Shows the verdict of one property; a dash where the method has no place in the model."""

    def show(cell: Mapping[str, Any]) -> str:
        return str(cell["properties"].get(name, "-")).partition(":")[0]

    return show


def _reasons(result: Mapping[str, Any], name: str | None = None) -> list[str]:
    """Why cells do not work, alike reasons together: the first of them, with its model's names and numbers."""
    found: dict[str, tuple[str, dict[str, list[str]]]] = {}
    for cell in result["cells"]:
        if name is None:
            told = "" if cell["verdict"] == "works" else f"{cell['verdict']}: {cell['reason']}"
        else:
            told = cell["properties"].get(name, "")
        verdict, colon, reason = told.partition(": ")
        if not colon or verdict == "n/a":
            continue
        said = f"{verdict}: {reason.partition('; groups:')[0]}"
        _, where = found.setdefault(_kind(said), (said, {}))
        where.setdefault(cell["method"], []).append(f"{cell['model_type']} {cell['head']}")
    everywhere = {m: sum(c["method"] == m and _has(c, name) for c in result["cells"]) for m in
                  {c["method"] for c in result["cells"]}}  # fmt: skip
    lines = []
    for said, where in found.values():
        places = [
            f"{method} on {'every model' if len(models) == everywhere[method] else ', '.join(models)}"
            for method, models in where.items()
        ]
        lines.append(f"{'; '.join(places)}: {said}")
    return lines


def _has(cell: Mapping[str, Any], name: str | None) -> bool:
    return name is None or not cell["properties"].get(name, "n/a").startswith("n/a")


def _kind(reason: str) -> str:
    """A reason without the names and numbers of one model."""
    return re.sub(
        r"'[^']*'|[\w.]+\.[\w.]+|\w+For\w+|\w+Model|-?\d[\d.e+-]*|\bthis \w+ model|^(\w+: )\w+ ",
        r"\1",
        reason,
    )


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
