"""The parts of an inspected model's page: each a function from its folder to a Section, or None where it does not apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from peftlab.report.block_drawing import NORM_NAMES
from peftlab.report.certificate_claims import claims_of
from peftlab.report.inspection_folder import InspectionFolder
from peftlab.report.model_drawing import draw_model
from peftlab.report.page import Section, picture, scrolling, tiles
from peftlab.report.reading_sections import activations, attention
from peftlab.tables import render_html, show_bytes, show_seconds

GROUPS = {
    "attention": "attention",
    "mlp": "MLP",
    "embed": "embeddings",
    "lm_head": "head",
    "other": "norms and others",
}
_STYLE = """
.beside{display:flex;flex-wrap:wrap;gap:8px 40px;align-items:flex-start}
.beside>div{max-width:100%}
.beside>div:last-child{flex:1 1 400px}
.beside table{width:100%}
.beside td:first-child{white-space:nowrap;min-width:0;width:1%}
"""


def glance(one: InspectionFolder) -> Section:
    """The numbers that people ask first."""
    document = one.document
    facts, total = document["facts"], document["shares"]["total"]
    claims = claims_of(document["certificates"], document["unproven"])
    stacks = document["map"]["stacks"]
    found = [
        ("parameters", f"{total['parameters']:,}"),
        (f"weights in {document['dtype']}", show_bytes(total["bytes"])),
        ("layers", " + ".join(f"{stack['num_layers']:,}" for stack in stacks)),
        ("hidden size", show_fact(facts["hidden size"])),
        _heads(facts),
        ("claims proved", f"{sum(claim.proved for claim in claims)} of {len(claims)}"),
    ]
    if document["adapter"]:
        share = percent(total["adapter_parameters"], total["parameters"])
        found[3] = (f"parameters of the adapter, {share}", f"{total['adapter_parameters']:,}")
    return Section("At a glance", tiles(found))


def map_and_facts(one: InspectionFolder) -> Section:
    """The drawing, and what the model is."""
    document = one.document
    note = (
        "From top to bottom as a text passes through. A block is drawn once for all layers that are alike; the line past a"
        " part is the residual stream, ⊕ where the part's output is added. Order and residuals are seen on a tiny twin."
    )
    if document["adapter"]:
        note += " Layers with a thick frame and a label have an adapter."
    rows = [["", ""], *([name, show_fact(value)] for name, value in document["facts"].items())]
    table = scrolling(_headless(render_html(rows)), wide=True)
    return Section(
        "Map and facts",
        f'<style>{_STYLE}</style><div class="beside"><div>{draw_model(document)}</div><div>{table}</div></div>'
        f'<p class="muted">{note}</p>',
    )


def adapter(one: InspectionFolder) -> Section | None:
    """What adapts the model."""
    found = one.document["adapter"]
    if not found:
        return None
    rows: list[list[Any]] = [
        ["", ""],
        ["method", found["method"]],
        ["base", found["base"]["name"]],
        ["task", found["task"]],
    ]
    rows += [[name.replace("_", " "), show_fact(value)] for name, value in found["settings"].items()]
    rows.append(
        ["parameters", f"{found['counts']['parameters']:,} in {found['counts']['tensors']:,} tensors"]
    )
    rows += [[f"{name}, after training", f"{value:.4g}"] for name, value in found["scores"].items()]
    return Section("Adapter", scrolling(_headless(render_html(rows)), wide=True))


def certificate(one: InspectionFolder) -> Section:
    """Every claim, proved or not."""
    document = one.document
    claims = claims_of(document["certificates"], document["unproven"])
    rows = "".join(
        f"<tr><td>{verdict(claim.proved)}</td><td>{escape(claim.text)}</td><td><code>{escape(claim.where)}</code></td>"
        f"<td>{escape(claim.how)}</td></tr>"
        for claim in claims
    )
    head = "<tr><th></th><th>claim</th><th>of</th><th>how, or why not</th></tr>"
    table = scrolling(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>", wide=True)
    made = "; ".join(
        f"{c['model_class']} with {', '.join(f'{n} {v}' for n, v in c['versions'].items()) or 'nothing proved'}"
        + (f" in {show_seconds(c['seconds'])}" if c["seconds"] else "")
        for c in document["certificates"]
    )
    note = f'<p class="muted">By experiments on a tiny random twin of the same config: {escape(made)}.</p>'
    return Section("Certificate", table + note)


def shares(one: InspectionFolder) -> Section:
    """Where parameters and bytes are."""
    from peftlab.figures.shares import plot_parameter_shares

    document = one.document
    found = document["shares"]
    total = found["total"]
    rows: list[list[Any]] = [["group", "parameters", "share", "memory"]]
    for group, name in GROUPS.items():
        size, taken = (
            sum(r[key] for r in found["rows"] if r["group"] == group) for key in ("parameters", "bytes")
        )
        if size:
            rows.append([name, size, percent(size, total["parameters"]), show_bytes(taken)])
    if total["adapter_parameters"]:
        share = percent(total["adapter_parameters"], total["parameters"])
        rows.append(["adapter", total["adapter_parameters"], share, show_bytes(total["adapter_bytes"])])
    whole = total["parameters"] + total["adapter_parameters"]
    rows.append(["all", whole, "", show_bytes(total["bytes"] + total["adapter_bytes"])])
    chart = plot_parameter_shares(
        found["rows"], [stack["name"] for stack in document["map"]["stacks"]], one.plots / "shares.png"
    )
    memory = _training_memory(document["training_memory"])
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in found["dtypes"].items())
    loaded = "as loaded here" if document["loaded"] else "as the config says; no weights were read"
    note = f"Parameters {loaded}: {dtypes}."
    if found["buffer_bytes"]:
        note += f" Buffers take {show_bytes(found['buffer_bytes'])} more."
    return Section(
        "Parameters and memory",
        scrolling(render_html(rows))
        + picture(chart, "parameters of each layer")
        + f'<p class="muted">{escape(note)}</p>{memory}',
    )


def _training_memory(found: Mapping[str, Any]) -> str:
    """What a training step would take, or why that is not known."""
    if "note" in found:
        return (
            f'<p class="muted">The memory of a training step is not predicted: {escape(found["note"])}.</p>'
        )
    shape = found["shape"]
    rows = [["part", "memory"], *([part, show_bytes(size)] for part, size in found["parts"].items() if size)]
    rows.append(["at the peak", show_bytes(found["peak_bytes"])])
    shown = (
        f"Predicted for {found['method']}, targets {found['targets']}, {shape['rows']} rows of {shape['length']} tokens,"
        f" weights in {found['dtype']} on {found['device']}, {'with' if found['checkpointing'] else 'without'} gradient"
        f" checkpointing; the peak is in the {found['moment']}."
    )
    note = f'<p class="muted">{escape(shown)} <code>peftlab plan</code> predicts any other run.</p>'
    return f"<h3>A training step</h3>{scrolling(render_html(rows))}{note}"


def words(one: InspectionFolder) -> Section | None:
    """How well the tokenizer's tokens make words."""
    found = one.document["words"]
    if found is None:
        return None
    text = (
        f"{100 * found['rate']:.1f} % of {found['num_words']} words in {found['num_lines']} plain and difficult lines"
        " have exactly the tokens that say them."
    )
    more = [
        f"{found['num_lost']} words have no token in this vocabulary" if found["num_lost"] else "",
        f"{found['num_spanning']} tokens belong to more than one word" if found["num_spanning"] else "",
        f"offsets had to be rebuilt in {found['num_rebuilt']} lines" if found["num_rebuilt"] else "",
    ]
    listed = "; ".join(filter(None, more))
    rows = [["word", "its tokens say"], *found["examples"]]
    table = (
        scrolling(render_html(rows, caption="Words that are not exact"), wide=True)
        if found["examples"]
        else ""
    )
    return Section("Words", f"<p>{text}{f' {listed}.' if listed else ''}</p>{table}")


def notes(one: InspectionFolder) -> Section | None:
    """What could not be seen."""
    found = one.document["notes"]
    if not found:
        return None
    return Section(
        "What could not be seen", "<ul>" + "".join(f"<li>{escape(n)}</li>" for n in found) + "</ul>"
    )


# -- words and numbers --------------------------------------------------------------------------------------------


def verdict(proved: bool) -> str:
    """A mark for a claim.

    Args:
        proved: Whether it was proved.

    Returns:
        HTML.
    """
    return '<span class="status">proved</span>' if proved else '<span class="status open">unproven</span>'


def percent(part: float, whole: float) -> str:
    """A share.

    Args:
        part: The part.
        whole: The whole.

    Returns:
        E.g. "12.3 %".
    """
    return f"{100 * part / whole:.3g} %" if whole else "-"


def show_fact(value: Any) -> str:
    """A fact as people read it.

    Args:
        value: A value from the facts; None where neither config nor proof says.

    Returns:
        The text.
    """
    if value is None:
        return "not told"
    if isinstance(value, str) and value in NORM_NAMES:
        return NORM_NAMES[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {show_fact(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _heads(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Heads, and key/value heads where they are fewer."""
    heads, keys = facts["heads"], facts["key/value heads"]
    if keys in (None, heads):
        return "heads", show_fact(heads)
    return "heads / key-value heads", f"{show_fact(heads)} / {show_fact(keys)}"


def _headless(table: str) -> str:
    """A table of names and values without its empty header."""
    return table.replace("<thead><tr><th></th><th></th></tr></thead>", "")


SECTIONS: tuple[Callable[[InspectionFolder], Section | None], ...] = (
    glance,
    map_and_facts,
    adapter,
    certificate,
    shares,
    words,
    attention,
    activations,
    notes,
)
"""The parts of the page in order."""
