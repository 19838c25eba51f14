"""What the page of base against tuned model says of weights: how far each module has moved, and what is new in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from peftlab.report.before_after_charts import Grid, draw_grids
from peftlab.report.before_after_tables import Document
from peftlab.report.before_after_words import absent_reason, told
from peftlab.report.page import Section, absent, scrolling
from peftlab.tables import render_html

_FIRST_MODULES, _MOST_MODULES = 12, 60
"""Modules whose numbers are seen at once, and those that are on the page at all."""
_KINDS = {
    "low rank": "A and B",
    "merged": "merging by peft",
    "trained": "its original",
    "trained whole": "the copy beside it",
}


def weights(document: Document) -> Section:
    """How far every module's weight has moved.

    Args:
        document: What was measured.

    Returns:
        The part of the page.
    """
    modules = document["modules"]
    if not modules:
        return Section("Weights", absent_reason(document, "weights"))
    html = ""
    in_layers = [m for m in modules if m["layer"] is not None and len(m["shape"]) == 2]
    for stack in dict.fromkeys(m["stack"] for m in in_layers):
        inside = [m for m in in_layers if m["stack"] == stack]
        html += draw_grids([_module_grid(inside, "ratio", f"|ΔW| / |W| in {stack}")], show=show_share)
    html += told("ratio")
    head = [
        "module",
        "shape",
        "rank",
        "|ΔW| / |W|",
        "spectral norm",
        "stable rank",
        "effective rank",
        "seen by",
    ]
    rows: list[list[Any]] = []
    ordered = sorted(modules, key=lambda m: -(m["ratio"] or 0.0))
    for m in ordered[:_MOST_MODULES]:
        shape = " × ".join(map(str, m["shape"]))
        numbers = [show_number(m[name]) for name in ("spectral_norm", "stable_rank", "effective_rank")]
        rows.append(
            [_short(m["path"]), shape, m["rank"] or "", show_share(m["ratio"]), *numbers, _KINDS[m["kind"]]]
        )
    beyond = (
        f" The first {_MOST_MODULES} of {len(modules)}; all are in the CSV."
        if len(modules) > _MOST_MODULES
        else ""
    )
    html += f'<p class="muted">The modules that moved most.{beyond}</p>'
    html += scrolling(render_html([head, *rows[:_FIRST_MODULES]]))
    if rows[_FIRST_MODULES:]:
        rest = scrolling(render_html([head, *rows[_FIRST_MODULES:]]))
        html += f"<details><summary>{len(rows) - _FIRST_MODULES} more</summary>{rest}</details>"
    return Section("Weights", html + told("ranks") + _refused(modules))


def intruders(document: Document) -> Section | None:
    """Singular vectors that the base's weights do not have.

    Args:
        document: What was measured.

    Returns:
        The part of the page; None where no module has moved.
    """
    modules = [m for m in document["modules"] if len(m["shape"]) == 2]
    if not modules:
        return None
    known = [m for m in modules if m["intruders"] is not None]
    asked = document["intruders"]
    lead = (
        f"<p>Of each tuned weight the {asked['top']} leading left singular vectors are looked at; one counts where its"
        f" cosine with every singular vector of the base's weight is below {asked['below']}.</p>"
    )
    if not known:
        reasons = dict.fromkeys(note for m in modules for note in m["notes"])
        return Section("Intruder dimensions", lead + absent("; ".join(reasons) or "no module has moved"))
    html = ""
    for stack in dict.fromkeys(m["stack"] for m in known if m["layer"] is not None):
        inside = [m for m in known if m["stack"] == stack and m["layer"] is not None]
        grids = [_module_grid(inside, "intruders", f"intruders in {stack}")]
        html += draw_grids(grids, most=float(asked["top"]), show=lambda value: f"{value:.0f}")
    least = min(known, key=lambda m: m["closest"])
    html += (
        f"<p>{sum(m['intruders'] for m in known)} in {len(known)} of {len(modules)} modules; the farthest vector is in"
        f" {escape(_short(least['path']))}, its nearest of the base has a cosine of {least['closest']:.2f}.</p>"
    )
    return Section("Intruder dimensions", lead + html + told("intruders"))


def _short(path: str) -> str:
    """A path without what peft puts before it."""
    return path.removeprefix("base_model.").removeprefix("model.")


def _module_grid(modules: Sequence[Document], key: str, title: str) -> Grid:
    """Modules by layer and by what they are for."""
    layers = sorted({m["layer"] for m in modules})
    roles = list(dict.fromkeys(_column(m) for m in modules))
    values: dict[tuple[int, str], float] = {}
    for m in modules:  # of several in one place, as experts are, the largest
        place = (m["layer"], _column(m))
        if m[key] is not None:
            values[place] = max(m[key], values.get(place, 0.0))
    return Grid(
        title, [str(layer) for layer in layers], roles,
        [[values.get((layer, role)) for role in roles] for layer in layers], "module", "layer",
    )  # fmt: skip


def _column(module: Document) -> str:
    """What a module is for, in few letters; the end of its path where the map does not say."""
    part, _, purpose = str(module["role"]).rpartition(".")
    if not part:
        return str(module["path"]).rpartition(".")[2][:8]
    return f"x-{purpose}"[:8] if part == "cross_attention" else purpose[:8]


def _refused(modules: Sequence[Document]) -> str:
    """Modules of which nothing is known."""
    refused = [f"{_short(m['path'])}: {'; '.join(m['notes'])}" for m in modules if m["norm"] is None]
    return f'<p class="absent">Not computed: {escape("; ".join(refused[:5]))}</p>' if refused else ""


def show_share(value: float | None) -> str:
    """A share as text.

    Args:
        value: The share; None where it is not known.

    Returns:
        E.g. "12.3 %", "" for None.
    """
    return "" if value is None else f"{100 * value:.3g} %"


def show_number(value: float | None) -> str:
    """A number as text.

    Args:
        value: The number; None where it is not known.

    Returns:
        Three digits, "" for None.
    """
    return "" if value is None else f"{value:.3g}"
