"""The parts of an inspected model's page that show what it did with texts: attention and activations."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from peftlab.report.inspection_folder import InspectionFolder
from peftlab.report.page import Section, absent, picture

BLANK = "␣"
"""Stands for a token of white space alone."""
_SHOWN_TEXTS = 2
_MOST_HEADS = 4
_HOW_TO_READ = (
    "A row is the word that looks, a column the word looked at; what a row lacks to 1 is on tokens of no word · above: what"
    " a head does most in its layer"
)


def attention(one: InspectionFolder) -> Section | None:
    """Chosen layers over words, and every head's statistics."""
    from peftlab.figures.attention import plot_head_statistics

    document = one.document
    if not document["readings"]:
        return (
            None
            if document["loaded"]
            else Section("Attention", absent("it needs a text, so leave out --no_text"))
        )
    html = ""
    for reading in document["readings"]:
        for seen in reading["attention"]:
            name = _attention_name(document, reading, seen)
            path = one.plots / f"attention.{reading['stack']}.{seen['kind']}.png"
            chart = plot_head_statistics(seen["layers"], path, title=f"What the heads do: {name}")
            html += f"<h3>{escape(name.capitalize())}</h3>{picture(chart, name)}"
            html += "".join(_word_maps(one, reading, seen, number) for number in range(len(reading["texts"])))
            note = seen["note"] or (
                "Recomputed beside the model's own attention and proved by its output."
                if seen["source"] == "probe"
                else "As the model hands it out."
            )
            html += f'<p class="muted">{escape(note[:1].upper() + note[1:])}</p>'
    return Section("Attention", html) if html else None


def _attention_name(document: Mapping[str, Any], reading: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    """What one kind of attention of one stack is called."""
    several = len(document["readings"]) > 1
    return f"{seen['kind']} attention" + (f" of the {reading['stack']}" if several else "")


def _word_maps(
    one: InspectionFolder, reading: Mapping[str, Any], seen: Mapping[str, Any], number: int
) -> str:
    """The heads of the chosen layers over the words of one text."""
    from peftlab.figures.attention import HeadMap, plot_attention_words

    if number >= _SHOWN_TEXTS:
        return ""
    queries = reading["texts"][number]["words"]
    source = next(r for r in one.document["readings"] if r["stack"] == seen["keys_of"])
    keys = source["texts"][number]["words"]
    html = ""
    for layer in seen["layers"]:
        name = f"{reading['stack']}.{seen['kind']}.layer_{layer['layer']}.text_{number}"
        if name not in seen["maps"]:
            continue
        weights = one.array(name)
        if max(weights.shape[1:]) < 2:  # one word can only look at itself
            continue
        maps = [HeadMap(_head_title(h, why), weights[h]) for h, why in chosen_heads(layer, len(weights))]
        chart = plot_attention_words(
            maps, one.plots / f"attention.{name}.png",
            title=f"Layer {layer['layer']}" + (f", text {number + 1}" if len(reading["texts"]) > 1 else ""),
            subtitle=_HOW_TO_READ,
            queries=queries[: weights.shape[1]], keys=keys[: weights.shape[2]],
        )  # fmt: skip
        html += picture(chart, f"attention of layer {layer['layer']} over words")
    return html


def _head_title(head: int, why: str) -> str:
    """What stands above one head."""
    return f"head {head}" + (f": {why}" if why else "")


def chosen_heads(layer: Mapping[str, Any], count: int) -> list[tuple[int, str]]:
    """Heads worth looking at: those that do something most, else the first ones.

    Args:
        layer: The statistics of one layer.
        count: How many heads it has.

    Returns:
        At most four heads in order, each with what it does most; "" where it is only there to be seen.
    """
    wanted = (
        ("previous_token_mass", max, "previous token"),
        ("sink_mass", max, "first token"),
        ("distance", max, "farthest"),
        ("entropy", min, "narrowest"),
        ("entropy", max, "widest"),
    )
    found: dict[int, str] = {}
    for name, best, why in wanted:
        known = {head: value for head, value in enumerate(layer.get(name) or ()) if value is not None}
        head = best(known, key=known.__getitem__) if known else None
        if head is not None and head not in found and len(found) < _MOST_HEADS:
            found[head] = why
    for head in range(count):
        if len(found) < min(_MOST_HEADS, count):
            found.setdefault(head, "")
    return sorted(found.items())


def activations(one: InspectionFolder) -> Section | None:
    """Norms, massive dimensions, and the way from layer to layer."""
    from peftlab.figures.activations import plot_activation_norms, plot_layer_profile

    readings = one.document["readings"]
    if not readings:
        return (
            None
            if one.document["loaded"]
            else Section("Activations", absent("they need a text, so leave out --no_text"))
        )
    html = picture(
        plot_layer_profile([(r["stack"], r["layers"]) for r in readings], one.plots / "profile.png"),
        "norms and cosines over layers",
    )
    for reading in readings:
        html += f"<p>{escape(_massive(reading, named=len(readings) > 1))}</p>"
        norms, start = one.array(reading["norms"]), 0
        for number, text in enumerate(reading["texts"]):
            end = start + len(text["tokens"])
            if number < _SHOWN_TEXTS:
                title = _norm_title(reading, number, several_stacks=len(readings) > 1)
                chart = plot_activation_norms(
                    norms[:, start:end], [token.strip() or BLANK for token in text["tokens"]],
                    one.plots / f"norms.{reading['stack']}.text_{number}.png", title=title,
                )  # fmt: skip
                html += picture(chart, title)
            start = end
    return Section("Activations", html)


def _norm_title(reading: Mapping[str, Any], number: int, *, several_stacks: bool) -> str:
    """What the norms of one text are called."""
    stack = f" of the {reading['stack']}" if several_stacks else ""
    text = f", text {number + 1}" if len(reading["texts"]) > 1 else ""
    return f"Norm of each token{stack}{text}"


def _massive(reading: Mapping[str, Any], *, named: bool) -> str:
    """Sentences on massive activations, with the stack's name where there are several."""
    found = {d for layer in reading["layers"] for d in layer["massive"]}
    dimensions = [
        d | {"layer": layer["layer"]}
        for layer in reading["layers"]
        for d in layer["top_dimensions"]
        if d["magnitude"] is not None
    ]
    top = max(dimensions, key=lambda d: d["magnitude"], default=None)
    if top is None:
        return f"The activations of the {reading['stack']} are not all numbers."
    token = reading["texts"][top["text"]]["tokens"][top["token"]].strip() or BLANK
    largest = (
        f"The largest is {top['magnitude']:.3g}, in dimension {top['dimension']} of layer {top['layer']} at “{token}”"
        + (f", {top['ratio']:,.0f} times the median of its layer." if top["ratio"] is not None else ".")
    )
    where = f" in the {reading['stack']}" if named else ""
    if not found:
        return f"No activation{where} is massive (above 100 and above 1,000 times the median). {largest}"
    return f"Massive activations{where} in dimensions {', '.join(map(str, sorted(found)[:8]))}. {largest}"
