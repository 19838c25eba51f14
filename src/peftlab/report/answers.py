"""Answers of a model as a section of a page: the best, the worst, some drawn at random, with prompt and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

from peftlab.report.page import Section
from peftlab.tables import show_score

NUM_EXAMPLES = 8
"""Test examples shown with their answers, where the evaluation does not say which."""
KINDS = {"best": "Best", "worst": "Worst", "random": "Drawn at random"}
_LONGEST = 400
"""Characters of a text that stand in the page at once; the rest is folded."""
_MOST_REFERENCES = 3
_EMPTY = '<span class="muted">(nothing)</span>'

Row = Mapping[str, Any]


def answer_section(
    chosen: Mapping[str, Any] | None, answers: Mapping[str, Sequence[Row]], *, trained: bool = True
) -> Section:
    """Some test examples with the model's answers.

    Args:
        chosen: Under "examples" of a half of an evaluation; None for one that does not say, whose first ones are shown.
        answers: The rows of its predictions under "before", "after" or both.
        trained: Whether they belong to a run, which is scored before and after training.

    Returns:
        The section; every text escaped, long ones folded.
    """
    names = {"before": "before", "after": "after"} if trained else {"after": "answer"}
    if chosen is None:
        pairs = zip_longest(*(rows[:NUM_EXAMPLES] for rows in answers.values()))
        boxes = [_example(dict(zip(answers, pair, strict=True)), names, ()) for pair in pairs]
        note = f'<p class="muted">The first {len(boxes)} test examples, as they come, not chosen.</p>'
        return Section("Answers", note + "".join(boxes))
    by_id = {when: {row["id"]: row for row in rows} for when, rows in answers.items()}
    parts = [f'<p class="muted">{escape(str(chosen.get("note", "")))}.</p>']
    for kind, title in KINDS.items():
        entries = [e for e in chosen.get(kind, ()) if any(e["id"] in rows for rows in by_id.values())]
        if entries:
            parts.append(f"<h3>{title}</h3>")
        for entry in entries:
            rows = {when: found.get(entry["id"]) for when, found in by_id.items()}
            parts.append(_example(rows, names, _facts(chosen, entry)))
    return Section("Answers", "".join(parts))


def describe_entry(chosen: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """The score of one example in words.

    Args:
        chosen: Under "examples" of an evaluation.
        entry: One of its entries.

    Returns:
        E.g. "bleu 36.04", "accuracy 0.000, given 0.97"; "" where there is neither.
    """
    told = []
    if entry.get("score") is not None:
        score = show_score({"value": entry["score"], "unit": chosen["unit"]})
        told.append(f"{chosen['metric']} {score}")
    if entry.get("probability") is not None:
        told.append(f"the model gave its answer a probability of {entry['probability']:.2f}")
    return ", ".join(told)


def _facts(chosen: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What is said of an example beside its texts."""
    told = describe_entry(chosen, entry)
    return (("example", f"{entry['id']}: {told}" if told else str(entry["id"])),)


def _example(
    rows: Mapping[str, Row | None], names: Mapping[str, str], facts: Sequence[tuple[str, str]]
) -> str:
    """One test example."""
    row = next(row for row in [*rows.values()][::-1] if row is not None)
    references = [("reference", text, "") for text in row["references"][:_MOST_REFERENCES]]
    more = len(row["references"]) - len(references)
    references += [("", f"and {more} more references", "muted")] if more > 0 else []
    lines = [*((name, text, "muted") for name, text in facts)]
    lines += [("prompt", row.get("prompt") or row["source"], ""), *references]
    for when, name in names.items():
        found = rows.get(when)
        if found is not None:
            lines.append((name, found["prediction"], "after" if when == "after" else ""))
    cells = (
        f'<div class="{kind}"><div class="k">{name}</div><div class="v">{_folded(str(text))}</div></div>'
        for name, text, kind in lines
    )
    return f'<div class="example">{"".join(cells)}</div>'


def _folded(text: str) -> str:
    """A text as HTML; the end of a long one opens on a click."""
    if not text:
        return _EMPTY
    if len(text) <= _LONGEST + _LONGEST // 4:
        return escape(text)
    rest = text[_LONGEST:]
    return f"{escape(text[:_LONGEST])}<details><summary>{len(rest):,} more characters</summary>{escape(rest)}</details>"
