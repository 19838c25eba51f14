"""The efficiency of several runs against the one that trains everything."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from peftlab.comparison import evaluation_of, metrics_of
from peftlab.efficiency import WEIGHTS, Efficiency, compare_efficiency
from peftlab.errors import DataError
from peftlab.report.page import Section, scrolling
from peftlab.run import RunFolder
from peftlab.tables import render_html

BASELINE = "full"
"""The method that trains everything: the document's scale for parameters and memory."""


def compare_with_full(runs: Sequence[tuple[str, RunFolder]]) -> Section | None:
    """The table of efficiencies, where exactly one of the runs trained everything.

    Args:
        runs: Label and run.

    Returns:
        The section; None where no run is a baseline, or more than one is.

    Raises:
        RunError: A file is damaged.
    """
    full = [(label, run) for label, run in runs if _methods(run) == [BASELINE]]
    if len(full) != 1 or len(runs) < 2:
        return None
    ((name, baseline),) = full
    rows: list[list[Any]] = [["", *(part.replace("_", " ") for part in WEIGHTS), "efficiency score"]]
    problems = []
    for label, run in runs:
        try:
            rows.append([label, *_cells(compare_efficiency(run, baseline))])
        except DataError as error:
            problems.append(str(error))
    weights = ", ".join(f"{weight:g} {part.replace('_', ' ')}" for part, weight in WEIGHTS.items())
    note = (
        f"From measured values: each part is a share between 0 and 1 against {escape(name)}, 0.5 where they are equal,"
        f" higher is better. {_metric(baseline)}The score weighs them as the efficient fine-tuning document does:"
        f" {weights}. Performance counts least there; read the parts."
    )
    listed = "".join(f"<li>{escape(problem)}.</li>" for problem in problems)
    listed = f"<ul>{listed}</ul>" if listed else ""
    table = scrolling(render_html(rows)) if len(rows) > 1 else ""
    return Section("Efficiency", f'{table}{listed}<p class="muted">{note}</p>')


def _cells(found: Efficiency) -> list[str]:
    """The four parts and their sum."""
    return [*(f"{getattr(found, part):.3f}" for part in WEIGHTS), f"{found.efficiency_score:.3f}"]


def _metric(run: RunFolder) -> str:
    """Which metric stands for performance."""
    found = metrics_of(evaluation_of(run), "after")
    return f"Performance is {escape(next(iter(found)))}. " if found else ""


def _methods(run: RunFolder) -> list[str]:
    """The methods of a run's adapters."""
    adapters = run.config.get("adapters") or [] if run.has(RunFolder.CONFIG) else []
    return [str(adapter.get("method")) for adapter in adapters]
