"""The page of a run, and the page that puts several runs side by side. Read from the run folders alone; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from peftlab.comparison import Comparison, compare_runs, evaluation_of, metrics_of, status_of
from peftlab.errors import DataError
from peftlab.files import write_json, write_text
from peftlab.losses import read_losses
from peftlab.report.comparison_charts import draw_losses, draw_scores
from peftlab.report.efficiency_table import compare_with_full
from peftlab.report.page import Section, render_page, scrolling
from peftlab.report.run_table import Facts, all_facts, draw_costs, draw_runs, to_csv
from peftlab.report.sections import SECTIONS
from peftlab.run import RunFolder
from peftlab.tables import render_html

COMPARISON = "comparison.html"


def write_report(run_folder: RunFolder | str | Path) -> Path:
    """Draw the charts of a run and write its page.

    Args:
        run_folder: A run folder, finished or not; what is not there yet is said to be so.

    Returns:
        `report.html` in the folder: one file that needs nothing else.

    Raises:
        DataError: The folder does not exist.
        RunError: A file is damaged; names it.
        OutputError: The page or a chart cannot be written.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    if not run.path.is_dir():
        raise DataError(f"{run.path} is not a folder; give a run folder")
    parts = [part for part in (section(run) for section in SECTIONS) if part is not None]
    return write_text(run.report, render_page(run.name, _lead(run), parts))


def write_comparison(
    run_folders: Sequence[RunFolder | str | Path], output_path: str | Path | None = None
) -> Path:
    """Write one page that puts several runs side by side, and its numbers as CSV and JSON beside it.

    Args:
        run_folders: The runs, finished or not.
        output_path: The page; `comparison.html` beside the first run where None.

    Returns:
        The page.

    Raises:
        DataError: There is no run, or a folder does not exist.
        RunError: A file is damaged; names it.
        OutputError: The page cannot be written.
    """
    comparison = compare_runs(run_folders)
    if not comparison.runs:
        raise DataError("no run is given to compare")
    for run in comparison.runs:
        if not run.path.is_dir():
            raise DataError(f"{run.path} is not a folder; give a run folder")
    path = (
        comparison.runs[0].path.absolute().parent / COMPARISON if output_path is None else Path(output_path)
    )
    lead = f'<p class="muted">{escape(", ".join(str(run.path) for run in comparison.runs))}</p>'
    title, facts = f"{len(comparison.runs)} runs side by side", all_facts(comparison)
    write_text(path.with_suffix(".csv"), to_csv(facts))
    write_json(path.with_suffix(".json"), {"runs": facts, "notes": comparison.notes})
    return write_text(path, render_page(title, lead, _comparison_sections(comparison, facts)))


def _lead(run: RunFolder) -> str:
    """What was run and how far it got."""
    words = []
    if run.has(RunFolder.CONFIG):
        config = run.config
        adapters = config.get("adapters") or [{}]
        method = ", ".join(str(adapter.get("method")) for adapter in adapters)
        words = [
            f"{method} on {config.get('model', {}).get('name')}",
            f"task {config.get('task', {}).get('name')}",
        ]
        strategy = (config.get("schedule") or {}).get("strategy")
        words += [f"schedule {strategy}"] if strategy else []
    kind = "status" if run.has_ended else "status open"
    status = f'<span class="{kind}">{escape(status_of(run))}</span>'
    return f"<p>{escape(' · '.join(words))} &nbsp;{status}</p>"


def _comparison_sections(comparison: Comparison, facts: Sequence[Facts]) -> list[Section]:
    """The parts of the page of several runs."""
    pairs = list(zip(comparison.labels, comparison.runs, strict=True))
    evaluations = [(label, evaluation_of(run)) for label, run in pairs]
    scores = [(label, metrics_of(e, "before"), metrics_of(e, "after")) for label, e in evaluations]
    notes = "".join(f"<li>{escape(note)}.</li>" for note in comparison.notes)
    settings = "<p>All settings are the same.</p>"
    if len(comparison.settings) > 1:
        settings = scrolling(render_html(comparison.settings), wide=True)
    pages = [run.report.absolute().as_uri() if run.report.exists() else None for run in comparison.runs]
    costs = draw_costs(facts)
    found = compare_with_full(pairs)
    return [
        Section("Scores", f"{draw_scores(scores)}<ul>{notes}</ul>"),
        Section("Runs", draw_runs(facts, pages)),
        *([Section("What a score costs", costs)] if costs else []),
        Section("Results", scrolling(render_html(comparison.results), wide=True)),
        *([found] if found is not None else []),
        Section("Settings that differ", settings),
        Section("Loss", draw_losses([(label, read_losses(run)) for label, run in pairs])),
    ]
