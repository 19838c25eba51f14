"""The parts of the page that puts two inspected models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from peftlab.report.certificate_claims import claims_of
from peftlab.report.inspection_folder import InspectionFolder
from peftlab.report.inspection_sections import GROUPS, percent, show_fact
from peftlab.report.model_drawing import draw_model
from peftlab.report.page import Section, picture, scrolling
from peftlab.tables import render_html, show_bytes

_STYLE = """
.pair{display:flex;flex-wrap:wrap;gap:8px 40px;align-items:flex-start}
.pair>div{max-width:100%}
.pair h3{overflow-wrap:anywhere}
.differs td{font-weight:600}
"""


@dataclass(frozen=True, slots=True)
class InspectedPair:
    """Two inspected models.

    Attributes:
        path: Their folder.
        document: The content of `comparison.json`.
        first: One.
        second: The other.
    """

    path: Path
    document: Mapping[str, Any]
    first: InspectionFolder
    second: InspectionFolder

    @property
    def parts(self) -> tuple[InspectionFolder, InspectionFolder]:
        """Both."""
        return self.first, self.second

    @property
    def labels(self) -> tuple[str, str]:
        """What they are called; by how they were named where their names are alike."""
        names = [str(part.document["name"]) for part in self.parts]
        if names[0] == names[1]:
            names = [str(part.document["reference"]) for part in self.parts]
        return (names[0], names[1]) if names[0] != names[1] else (f"{names[0]} (a)", f"{names[1]} (b)")


def facts(pair: InspectedPair) -> Section:
    """Facts side by side; those that differ stand out."""
    first, second = (part.document["facts"] for part in pair.parts)
    rows = ""
    for name in _in_order(list(first), list(second)):
        one, other = (show_fact(side[name]) if name in side else "-" for side in (first, second))
        mark = ' class="differs"' if one != other else ""
        rows += f"<tr{mark}><td>{escape(name)}</td><td>{escape(one)}</td><td>{escape(other)}</td></tr>"
    head = f"<tr><th></th>{''.join(f'<th>{escape(label)}</th>' for label in pair.labels)}</tr>"
    table = scrolling(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>", wide=True)
    return Section("Facts", f'<style>{_STYLE}</style>{table}<p class="muted">Bold where they differ.</p>')


def _in_order(first: list[str], second: list[str]) -> list[str]:
    """The names of both, those of the second alone behind the one that they follow."""
    names = list(first)
    for before, name in zip([None, *second], second, strict=False):
        if name not in names:
            names.insert(0 if before is None else names.index(before) + 1, name)
    return names


def maps(pair: InspectedPair) -> Section:
    """Both drawings."""
    halves = "".join(
        f"<div><h3>{escape(label)}</h3>{draw_model(part.document)}</div>"
        for label, part in zip(pair.labels, pair.parts, strict=True)
    )
    return Section("Maps", f'<div class="pair">{halves}</div>')


def certificates(pair: InspectedPair) -> Section:
    """What is proved of each, in short; the whole is on each model's own page."""
    rows = [["model", "claims proved", "not proved"]]
    for label, part in zip(pair.labels, pair.parts, strict=True):
        claims = claims_of(part.document["certificates"], part.document["unproven"])
        open_ones = "; ".join(
            f"{c.text}{f' ({c.where})' if c.where else ''}: {c.how}" for c in claims if not c.proved
        )
        rows.append([label, f"{sum(c.proved for c in claims)} of {len(claims)}", open_ones or "nothing"])
    return Section("Certificates", scrolling(render_html(rows), wide=True))


def shares(pair: InspectedPair) -> Section:
    """Parameters and bytes of both."""
    sides = [part.document["shares"] for part in pair.parts]
    rows: list[list[Any]] = [["group", *(text for label in pair.labels for text in (label, "share"))]]
    for group, name in GROUPS.items():
        sizes = [sum(r["parameters"] for r in side["rows"] if r["group"] == group) for side in sides]
        if any(sizes):
            cells = [
                (size, percent(size, side["total"]["parameters"]))
                for size, side in zip(sizes, sides, strict=True)
            ]
            rows.append([name, *(cell for pairs in cells for cell in pairs)])
    if any(side["total"]["adapter_parameters"] for side in sides):
        added = [(s["total"]["adapter_parameters"], s["total"]["parameters"]) for s in sides]
        rows.append(["adapter", *(cell for size, whole in added for cell in (size, percent(size, whole)))])
    whole = [s["total"]["parameters"] + s["total"]["adapter_parameters"] for s in sides]
    rows.append(["all", whole[0], "", whole[1], ""])
    taken = [s["total"]["bytes"] + s["total"]["adapter_bytes"] for s in sides]
    rows.append(["memory of the weights", show_bytes(taken[0]), "", show_bytes(taken[1]), ""])
    return Section("Parameters and memory", scrolling(render_html(rows)))


def similarity(pair: InspectedPair) -> Section:
    """How alike the layers are on the words that both read."""
    from peftlab.figures.similarity import plot_similarity

    found = pair.document["similarity"]
    if found is None:
        return Section("Similarity", f'<p class="absent">Not compared: {escape(pair.document["note"])}.</p>')
    chart = plot_similarity(found, pair.labels, pair.path / "plots" / "similarity.png")
    stacks = [
        f"the {stack} of {label}" for stack, label in zip(pair.document["stacks"], pair.labels, strict=True)
    ]
    text = (
        "A word is the mean of its tokens, so that the two tokenizers need not agree; compared are"
        f" {escape(' and '.join(stacks))}. Shuffled words reach up to {found['chance']:.2f} by chance (95 % of 20 shuffles):"
        " what is not above that says nothing. One very large dimension decides a similarity alone, so it is given without"
        f" the {found['left_out']} largest too."
    )
    few = (
        ""
        if found["words"] >= 50
        else f" {found['words']} words are few: give more text for numbers to rely on."
    )
    return Section("Similarity", f"{picture(chart, 'similarity of layers')}<p>{text}{few}</p>")


def attention(pair: InspectedPair) -> Section | None:
    """Attention of both, word by word."""
    from peftlab.figures.attention import plot_attention_comparison

    sides = []
    for label, part in zip(pair.labels, pair.parts, strict=True):
        readings = part.document["readings"]
        seen = [a for a in (readings[0]["attention"] if readings else ()) if a["kind"] == "self"]
        if seen:
            sides.append((label, seen[0]["layers"]))
    if not sides:
        return None
    chart = plot_attention_comparison(sides, pair.path / "plots" / "attention.png")
    missing = [label for label in pair.labels if label not in [side[0] for side in sides]]
    note = f'<p class="absent">Not there: the attention of {escape(missing[0])}.</p>' if missing else ""
    return Section("Attention", picture(chart, "attention layer by layer") + note)


def activations(pair: InspectedPair) -> Section | None:
    """The stream of both from layer to layer."""
    from peftlab.figures.activations import plot_layer_profile

    sides = [
        (label, part.document["readings"][0]["layers"])
        for label, part in zip(pair.labels, pair.parts, strict=True)
        if part.document["readings"]
    ]
    if not sides:
        return None
    return Section(
        "Activations",
        picture(plot_layer_profile(sides, pair.path / "plots" / "profile.png"), "norms over layers"),
    )


def words(pair: InspectedPair) -> Section | None:
    """How well both tokenizers make words."""
    rows: list[list[Any]] = [
        ["model", "words with exactly their tokens", "tokens over several words", "words without tokens"]
    ]
    for label, part in zip(pair.labels, pair.parts, strict=True):
        found = part.document["words"]
        if found:
            rows.append([label, f"{100 * found['rate']:.1f} %", found["num_spanning"], found["num_lost"]])
    return Section("Words", scrolling(render_html(rows))) if len(rows) > 1 else None


def notes(pair: InspectedPair) -> Section | None:
    """What could not be seen in one or the other."""
    found = [
        f"{label}: {note}"
        for label, part in zip(pair.labels, pair.parts, strict=True)
        for note in part.document["notes"]
    ]
    if not found:
        return None
    return Section(
        "What could not be seen", "<ul>" + "".join(f"<li>{escape(n)}</li>" for n in found) + "</ul>"
    )


PAIR_SECTIONS: tuple[Callable[[InspectedPair], Section | None], ...] = (
    facts,
    maps,
    certificates,
    shares,
    similarity,
    attention,
    activations,
    words,
    notes,
)
"""The parts of the page in order."""
