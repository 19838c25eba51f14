"""The page of base against tuned model: what fine-tuning changed, each measure with how to read it and where it misleads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from peftlab.files import write_text
from peftlab.report.before_after_charts import GRID_STYLE, Grid, Line, draw_grids, draw_lines
from peftlab.report.before_after_tables import (
    Document,
    as_csv,
    head_rows,
    layer_rows,
    module_rows,
    stacks_of,
)
from peftlab.report.before_after_weights import intruders, show_number, show_share, weights
from peftlab.report.before_after_words import NAMES, absent_reason, told
from peftlab.report.inspection_folder import read_document
from peftlab.report.page import Section, absent, render_page, scrolling, tiles
from peftlab.tables import render_html

BEFORE_AFTER = "before_after.json"
"""Everything that was measured."""
BEFORE_AFTER_PAGE = "before_after.html"


def write_before_after_page(folder: Path) -> Path:
    """Write the page, and the tables beside it.

    Args:
        folder: A folder with `before_after.json`.

    Returns:
        `before_after.html`; beside it are `before_after_layers.csv`, `before_after_heads.csv`, `before_after_modules.csv`.

    Raises:
        DataError: The folder has no such file.
        RunError: It is damaged.
        OutputError: Something cannot be written.
    """
    document = read_document(folder / BEFORE_AFTER)
    for name, rows in (
        ("layers", layer_rows(document)),
        ("heads", head_rows(document)),
        ("modules", module_rows(document)),
    ):
        write_text(folder / f"before_after_{name}.csv", as_csv(rows))
    sections = [section for make in _SECTIONS if (section := make(document)) is not None]
    title = f"Before and after: {document['name']}"
    return write_text(folder / BEFORE_AFTER_PAGE, render_page(title, _lead(document), sections))


# -- the page -----------------------------------------------------------------------------------------------------


def _lead(document: Document) -> str:
    """What is compared, and the numbers that a person looks for first."""
    passes = (
        "Both were run in one pass of one loaded model, a batch's first half without the adapter and its second half with"
        " it."
        if document["passes"] == 1
        else f"Both are one loaded model, run twice, without and with what was trained: {document['why_two_passes']}."
    )
    kinds = " and ".join(
        f"<b>{escape(NAMES[p['name']])}</b> ({escape(p['told'])})" for p in document["passages"]
    )
    added = "".join(
        f" In the {escape(stack)} it has new blocks that the base does not have (layer {', '.join(map(str, layers))});"
        " the layers here are the base's."
        for stack, layers in document["added"].items()
    )
    return (
        f"{GRID_STYLE}<p>{escape(document['method'])} on {escape(document['base'])}, against {escape(document['base'])} as"
        f" it was.</p><p>Read were {kinds}.</p><p class='muted'>{escape(passes)}{added}</p>{tiles(_tiles(document))}"
    )


def _tiles(document: Document) -> list[tuple[str, str]]:
    """The first numbers."""
    found = []
    ratios = [m["ratio"] for m in document["modules"] if m["ratio"] is not None]
    if ratios:
        found.append(("median change of a weight, of its norm", f"{100 * statistics.median(ratios):.3g} %"))
    for passages, stack in stacks_of(document):
        drifts = [(row["drift_without_first"], row["layer"]) for row in stack["layers"]]
        known = [d for d in drifts if d[0] is not None]
        if known and stack is passages["stacks"][-1]:
            value, layer = max(known)
            found.append(
                (f"farthest drift on {NAMES[passages['name']]}, layer {layer}", f"{100 * value:.3g} %")
            )
    counted = [m["intruders"] for m in document["modules"] if m["intruders"] is not None]
    if counted:
        found.append((f"intruder dimensions in {len(counted)} modules", str(sum(counted))))
    loss = _general(document)
    if loss:
        found.append(("loss on general text, nats a token", f"{loss['difference']:+.3g}"))
    return found


def _states(document: Document) -> Section:
    """Drift and cosine of the hidden states."""
    html = ""
    for name, text in (("drift", "relative drift |h' − h| / |h|"), ("cosine", "cosine of h and h'")):
        html += _over_layers(
            document, text, [(f"{name}_without_first", "", False), (name, ", all tokens", True)], name
        )
        html += told(name)
    return Section("Hidden states", html)


def _similarity(document: Document) -> Section:
    """Debiased CKA: layer by layer, and every layer with every other."""
    html = ""
    for passages, stack in stacks_of(document):
        found = stack["similarity"]
        heading = f"<h3>{escape(_title(document, passages, stack))}</h3>"
        if "all_dimensions" not in found:
            html += heading + absent(found["note"])
            continue
        names = [str(layer) for layer in found["layers"]]
        grids = [
            Grid(title, names, names, found[key], "layer of the tuned model", "layer of the base")
            for key, title in (
                ("all_dimensions", "all dimensions"),
                ("without_top", f"without the {found['left_out']} of largest variance"),
            )
        ]
        html += f"{heading}{draw_grids(grids, most=1.0)}" + (
            f"<p>A sample of {found['tokens']:,} tokens, first tokens left out. Shuffled tokens reach"
            f" {found['chance']:.2f} by chance ({found['chance_without_top']:.2f} without the largest dimensions).</p>"
        )
    return Section("Similarity (CKA)", html + told("cka"))


def _lens(document: Document) -> Section:
    """Logit lens and divergence by layer."""
    if not any(stack["output"] for _, stack in stacks_of(document)):
        return Section("Logit lens", absent_reason(document, "lens"))
    html = _over_layers(document, "KL(base ‖ tuned), nats", [("kl", "", False)], "kl")
    rows: list[list[Any]] = [["passages", "KL at the output, nats", "same first choice", "tokens asked"]]
    for passages, stack in stacks_of(document):
        if stack["output"]:
            output = stack["output"]
            rows.append(
                [
                    NAMES[passages["name"]],
                    show_number(output["kl"]),
                    show_share(output["same_top"]),
                    stack["lens_tokens"],
                ]
            )
    html += scrolling(render_html(rows)) + told("kl")
    series = [("lens_loss_tuned", ", tuned", False), ("lens_loss_base", ", base", True)]
    if any(
        row.get("lens_loss_base") is not None for _, stack in stacks_of(document) for row in stack["layers"]
    ):
        html += _over_layers(document, "loss of what each layer would say, nats", series, "") + told("lens")
    return Section("Logit lens", html)


def _attention(document: Document) -> Section:
    """How far every head has moved."""
    html = ""
    for passages, stack in stacks_of(document):
        for seen in stack["attention"]:
            layers = seen["layers"]
            heads = max(len(layer["js"]) for layer in layers)
            grids = [
                Grid(
                    title,
                    [str(layer["layer"]) for layer in layers],
                    [str(head) for head in range(heads)],
                    [[*layer[key], *[None] * (heads - len(layer[key]))] for layer in layers],
                    "head",
                    "layer",
                )
                for key, title in (("js", "Jensen-Shannon, nats"), ("tv", "total variation"))
            ]
            kind = "" if seen["kind"] == "self" else ", attention to the encoder"
            html += f"<h3>{escape(_title(document, passages, stack))}{kind}</h3>"
            html += draw_grids(grids, own_scales=True, show="{:.3f}".format)
            html += f'<p class="muted">{seen["passages"]} passages, {seen["queries"]:,} queries.</p>'
    return Section("Attention", html + told("attention") if html else absent_reason(document, "attention"))


def _forgetting(document: Document) -> Section:
    """The loss on general text, before and after."""
    rows: list[list[Any]] = [
        ["passages", "base", "tuned", "difference", "95 % interval", "p", "passages ", "tokens"]
    ]
    for passages in document["passages"]:
        loss = passages["loss"]
        if loss:
            low_high = "" if loss["interval"] is None else "{:+.3f} to {:+.3f}".format(*loss["interval"])
            rows.append(
                [
                    NAMES[passages["name"]],
                    f"{loss['base']:.3f}",
                    f"{loss['tuned']:.3f}",
                    f"{loss['difference']:+.3f}",
                    low_high,
                    f"{loss['p_value']:.4f}",
                    loss["passages"],
                    loss["tokens"],
                ]
            )
    if len(rows) == 1:
        return Section("Loss on general text", absent_reason(document, "loss"))
    general = _general(document)
    verdict = f"<p><b>{escape(_verdict(general))}</b></p>" if general else absent_reason(document, "loss")
    return Section("Loss on general text", verdict + scrolling(render_html(rows)) + told("loss"))


def _verdict(loss: Document) -> str:
    """Whether general text was forgotten, as far as these passages can tell."""
    low, high = loss["interval"]
    change = f"{loss['difference']:+.3f} nats a token"
    if low <= 0 <= high or loss["p_value"] >= 0.05:
        return f"Not decided: {change} lies within what chance gives on {loss['passages']} passages."
    if low > 0:
        return f"The tuned model says general text worse than the base did: {change}."
    return f"The tuned model says general text better than the base did: {change}."


def _notes(document: Document) -> Section | None:
    """What could not be measured."""
    if not document["notes"]:
        return None
    listed = "".join(f"<li>{escape(note[:1].upper() + note[1:])}</li>" for note in document["notes"])
    return Section("What was not measured", f"<ul>{listed}</ul>")


# -- parts --------------------------------------------------------------------------------------------------------


def _over_layers(document: Document, name: str, series: Sequence[tuple[str, str, bool]], key: str) -> str:
    """One chart for each stack: a colour for each kind of passages."""
    html = ""
    for stack_name in dict.fromkeys(stack["stack"] for _, stack in stacks_of(document)):
        lines = []
        layers: list[int] = []
        for colour, (passages, stack) in enumerate(
            pair for pair in stacks_of(document) if pair[1]["stack"] == stack_name
        ):
            layers = [row["layer"] for row in stack["layers"]]
            for field, beside, dashed in series:
                values = [row.get(field) for row in stack["layers"]]
                if any(value is not None for value in values):
                    lines.append(Line(NAMES[passages["name"]] + beside, values, colour, dashed))
        if lines:
            several = len({stack["stack"] for _, stack in stacks_of(document)}) > 1
            title = f"{name}, {stack_name}" if several else name
            html += draw_lines(lines, layers, name=title, bottom=0.0 if key in ("drift", "kl") else None)
    return html


def _title(document: Document, passages: Document, stack: Document) -> str:
    """What one stack on one kind of passages is called."""
    several = len(passages["stacks"]) > 1
    name = NAMES[passages["name"]]
    return f"{name[:1].upper()}{name[1:]}" + (f", {stack['stack']}" if several else "")


def _general(document: Document) -> Document | None:
    """The loss on general text."""
    return next((p["loss"] for p in document["passages"] if p["name"] == "general"), None)


_SECTIONS: tuple[Callable[[Document], Section | None], ...] = (
    _forgetting,
    weights,
    intruders,
    _states,
    _similarity,
    _lens,
    _attention,
    _notes,
)
