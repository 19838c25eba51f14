"""The page of an experiment: the answer first, then scores, what they cost, curves, and every run with its own page."""

from __future__ import annotations

import statistics
from html import escape

from peftlab.losses import read_losses
from peftlab.report.comparison_charts import draw_losses, draw_scores
from peftlab.report.page import Section, render_page, scrolling
from peftlab.report.pareto_chart import Point, draw_pareto
from peftlab.report.sortable import Cell, sortable_table
from peftlab.study.scoring import Verdict
from peftlab.study.telling import Findings
from peftlab.tables import render_html, show_bytes, show_count, show_seconds

_MOST_CURVES = 14


def render_study(findings: Findings) -> str:
    """The page.

    Args:
        findings: What was found.

    Returns:
        HTML that needs nothing else.
    """
    answers = "".join(f"<li>{escape(verdict.sentence)}</li>" for verdict in findings.verdicts)
    lead = f"<ul>{answers}</ul>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in findings.notes)
    tables = [
        Section(table.title, scrolling(render_html(table.rows), wide=True)) for table in findings.tables()
    ]
    curves = [
        (f"{arm}, seed {run.planned.seed}", read_losses(run.run))
        for arm, runs in findings.carried.done.items()
        for run in runs[:1]
    ][:_MOST_CURVES]
    parts = [
        Section("Scores", draw_scores(_bars(findings))),
        *_weighed(findings),
        *tables,
        Section("Loss, first seed of each arm", draw_losses(curves)),
        Section("Runs", _runs(findings)),
        Section("How to read this", f"<ul>{notes}</ul>"),
    ]
    return render_page(findings.question, lead, parts)


def _bars(findings: Findings) -> list[tuple[str, None, dict[str, object]]]:
    """Means and intervals of every arm, as the chart takes them; over seeds where there are several."""
    found = []
    for arm in findings.carried.done:
        after: dict[str, object] = {}
        for verdict in findings.verdicts:
            after[verdict.metric] = {
                "value": statistics.fmean(verdict.values[arm]),
                "unit": verdict.unit,
                "higher_is_better": verdict.higher_is_better,
                "interval": _interval(verdict, arm),
            }
        found.append((arm, None, after))
    return found


def _interval(verdict: Verdict, arm: str) -> tuple[float, float] | None:
    """The interval over examples of an arm, where there is one."""
    score = verdict.scores.get(arm)
    return None if score is None else score.over_examples


def _weighed(findings: Findings) -> list[Section]:
    """The headline's score against parameters, memory and time."""
    if not findings.verdicts:
        return []
    headline, done = findings.verdicts[0], findings.carried.done
    costs = (
        ("trainable parameters", "trainable_parameters", lambda v: show_count(round(v))),
        ("peak memory", "peak_memory_bytes", show_bytes),
        ("seconds of training", "seconds", show_seconds),
    )
    drawn = []
    for name, key, show_cost in costs:
        points = [
            Point(
                arm,
                statistics.fmean(float(run.result[key]) for run in runs),
                statistics.fmean(headline.values[arm]),
                _interval(headline, arm),
            )
            for arm, runs in done.items()
        ]
        score = f"{headline.metric} ({headline.unit})"
        drawn.append(
            f"<h3>{escape(name.capitalize())}</h3>"
            + draw_pareto(
                points,
                cost=name,
                score=score,
                show_cost=show_cost,
                higher_is_better=headline.higher_is_better,
            )
        )
    return [Section("What a score costs", "".join(drawn))]


def _runs(findings: Findings) -> str:
    """Every run, sortable, with a link to its page."""
    header = [
        "run", "arm", "seed", *(v.metric for v in findings.verdicts), "validation loss", "learning rate", "trainable",
        "training", "peak memory",
    ]  # fmt: skip
    rows = []
    for arm, runs in findings.carried.done.items():
        for place, run in enumerate(runs):
            result, page = run.result, run.run.report
            scores = [verdict.values[arm][place] for verdict in findings.verdicts]
            loss = result["validation_loss"]
            rows.append(
                [
                    Cell(str(result["run"]), link=page.absolute().as_uri() if page.exists() else None),
                    Cell(arm),
                    Cell(str(run.planned.seed), run.planned.seed),
                    *(Cell(f"{score:.4g}", score) for score in scores),
                    Cell("-", "") if loss is None else Cell(f"{loss:.4f}", loss),
                    Cell(f"{result['learning_rate']:g}", result["learning_rate"]),
                    Cell(show_count(result["trainable_parameters"]), result["trainable_parameters"]),
                    Cell(show_seconds(result["seconds"]), result["seconds"]),
                    Cell(show_bytes(result["peak_memory_bytes"]), result["peak_memory_bytes"]),
                ]
            )
    return sortable_table(header, rows)
