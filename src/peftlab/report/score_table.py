"""The scores of an evaluation as a section of a page: before and after, with intervals, and what was not computed."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from peftlab.comparison import metrics_of
from peftlab.report.page import Section, absent, scrolling
from peftlab.tables import show_score

_MOST_SIGNATURES = 4
"""Signatures that stand in the page at once."""
_COLUMNS = ("metric", "before", "after", "change", "on the whole scale", "unit")


def score_section(evaluation: Mapping[str, Any] | None, *, trained: bool = True) -> Section:
    """Scores before and after, with intervals and units.

    Args:
        evaluation: The content of `{task}_evaluation.json`; None where there is none yet.
        trained: Whether they belong to a run, which is scored before and after training.

    Returns:
        The section; a metric that was not computed has the reason in place of a number.
    """
    before, after = metrics_of(evaluation, "before"), metrics_of(evaluation, "after")
    if evaluation is None or not (before or after):
        return Section(
            "Scores", absent("the scores come before and after training, unless evaluation is off")
        )
    head = "".join(f"<th>{name}</th>" for name in (_COLUMNS if trained else _plain(_COLUMNS)))
    body = "".join(
        _score_row(name, before.get(name), after.get(name), trained=trained) for name in {**after, **before}
    )
    missing = _not_computed(evaluation)
    body += "".join(
        f'<tr><td>{escape(name)}</td><td colspan="{5 if trained else 3}" class="muted">not computed: {escape(why)}</td></tr>'
        for name, why in missing.items()
    )
    note = (
        f"On {evaluation['num_examples']:,} {escape(str(evaluation['split']))} examples; in brackets and as bands: 95 %"
        " bootstrap interval over examples."
    )
    note += " Grey: before, coloured: after." if trained else ""
    half = evaluation.get("after") or evaluation["before"]
    decoding = ", ".join(
        str(value) if key == "kind" else f"{key.replace('_', ' ')} {_listed(value)}"
        for key, value in half["decoding"].items()
    )
    signed = {name: s["signature"] for name, s in (after or before).items() if s.get("signature")}
    lines = "<br>".join(escape(f"{name}: {signature}") for name, signature in signed.items())
    exact = f"<br>{lines}" if len(signed) <= _MOST_SIGNATURES else _fold(lines)
    waiting = "" if after else absent("the scores after training")
    table = scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return Section(
        "Scores", f'{table}{waiting}<div class="muted">{note}<br>Decoding: {escape(decoding)}.{exact}</div>'
    )


def _fold(lines: str) -> str:
    """Many lines that open on a click."""
    return f"<details><summary>what exactly was computed</summary>{lines}</details>"


def _plain(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of a model that is scored once."""
    return tuple("score" if name == "after" else name for name in columns if name not in ("before", "change"))


def _listed(value: Any) -> str:
    """A setting on one line."""
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def _not_computed(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Metrics that were not computed, with the reason; where that is so of one half alone, it is said."""
    halves = {when: evaluation.get(when) for when in ("before", "after")}
    found: dict[str, str] = {}
    for when, half in halves.items():
        for name, why in ((half or {}).get("not_computed") or {}).items():
            other = halves["after" if when == "before" else "before"]
            alone = other is not None and name not in (other.get("not_computed") or {})
            found[name] = f"{why} ({when} training alone)" if alone else why
    return found


def _score_row(
    name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, *, trained: bool
) -> str:
    """One metric."""
    score = after or before or {}
    digits = 3 if score["unit"] == "rate" else 2
    change = f"{after['value'] - before['value']:+.{digits}f}" if before and after else "-"
    better = "higher is better" if score["higher_is_better"] else "lower is better"
    cells = [show_score(before), show_score(after), change] if trained else [show_score(after)]
    numbers = "".join(f'<td class="n" style="white-space:nowrap">{escape(cell)}</td>' for cell in cells)
    unit = f'<span style="white-space:nowrap">{escape(score["unit"])}, <span class="muted">{better}</span></span>'
    return f"<tr><td>{escape(name)}</td>{numbers}<td>{_span(before, after)}</td><td>{unit}</td></tr>"


def _span(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """A line drawing of the two scores and their intervals on one scale."""
    above, below = (7, 17) if before and after else (12, 12)
    pairs = ((before, "#8c959f", above), (after, "var(--accent)", below))
    found = [(score, colour, y) for score, colour, y in pairs if score]
    ends = {"0-100": (0.0, 100.0), "rate": (0.0, 1.0)}.get(found[0][0]["unit"])
    numbers = [n for s, _, _ in found for n in (s["value"], *(s.get("interval") or ()))]
    low, high = ends or (min(0.0, *numbers), max(numbers))
    low, high = min(low, *numbers), max(high, *numbers)

    def x(value: float) -> float:
        return float(round(4 + 192 * (value - low) / ((high - low) or 1), 2))

    drawn = "".join(
        (
            f'<line x1="{x(s["interval"][0])}" x2="{x(s["interval"][1])}" y1="{y}" y2="{y}" stroke="{colour}"'
            ' stroke-width="6" stroke-opacity=".4"/>'
            if s.get("interval")
            else ""
        )
        + f'<circle cx="{x(s["value"])}" cy="{y}" r="2.6" fill="{colour}"/>'
        for s, colour, y in found
    )
    return (
        f'<svg class="span" width="200" height="24" role="img" aria-label="from {low:g} to {high:g}">'
        '<line x1="4" x2="196" y1="12" y2="12" stroke="currentColor" stroke-opacity=".18"/>'
        f"{drawn}</svg>"
    )
