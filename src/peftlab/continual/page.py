"""The page of the continual-learning experiment: the answer, the matrices, the curves, the tables, how to read them."""

from __future__ import annotations

from html import escape
from pathlib import Path

from peftlab.continual.judging import AVERAGE
from peftlab.continual.telling import CURVES, HEAT_MAP, Findings
from peftlab.report.comparison_charts import draw_scores
from peftlab.report.page import Section, picture, render_page, scrolling
from peftlab.tables import render_html


def render_continual(findings: Findings, folder: Path) -> str:
    """The page.

    Args:
        findings: What was found.
        folder: Where the charts lie.

    Returns:
        HTML that needs nothing else.
    """
    answers = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings.sentences())
    order = " → ".join(lesson.label for lesson in findings.lessons)
    lead = f"<p>{escape(findings.question)}</p><p class='muted'>{escape(order)}</p><ul>{answers}</ul>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in findings.notes())
    first, *others = [
        Section(title, scrolling(render_html(rows), wide=True)) for title, rows in findings.tables()
    ]
    parts = [
        Section("Average after the last stage", draw_scores(_bars(findings))),
        Section("Every task after every stage", picture(folder / HEAT_MAP, "matrices of scores")),
        Section("What becomes of each task", picture(folder / CURVES, "score of each task after each stage")),
        first,
        Section("Tables", "".join(f"<h3>{escape(part.title)}</h3>{part.html}" for part in others)),
        Section("How to read this", f"<ul>{notes}</ul>"),
    ]
    return render_page("experiment continual", lead, parts)


def _bars(findings: Findings) -> list[tuple[str, None, dict[str, object]]]:
    """The average of each arm with its interval over examples, as the chart takes it."""
    name = f"{AVERAGE} of {findings.metrics[0]}"
    verdict = next(verdict for verdict in findings.verdicts if verdict.metric == name)
    bars = []
    for arm, values in verdict.values.items():
        score = verdict.scores.get(arm)
        after: dict[str, object] = {
            name: {
                "value": sum(values) / len(values),
                "unit": verdict.unit,
                "higher_is_better": verdict.higher_is_better,
                "interval": None if score is None else score.over_examples,
            }
        }
        bars.append((arm, None, after))
    return bars
