"""What an experiment says: its answer, tables as Markdown, every number as JSON and CSV, and one page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.files import write_json, write_text
from peftlab.run_series import edge_note, rate_rows, render_markdown
from peftlab.study.carrying import Carried, DoneRun
from peftlab.study.scoring import Verdict
from peftlab.study.settings import StudySettings
from peftlab.tables import render_text, show_bytes, show_count, show_seconds

TABLE, NUMBERS, RUNS, PAGE = "table.md", "results.json", "runs.csv", "report.html"
_COSTS = ("trainable_parameters", "peak_memory_bytes", "seconds", "tokens_per_second", "adapter_bytes")


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a title.

    Attributes:
        title: What it holds.
        rows: The header, then the rows.
    """

    title: str
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that an experiment came to.

    Attributes:
        question: What was asked.
        carried: The runs.
        verdicts: One for each metric, the headline first.
        more: The experiment's own tables.
        notes: What a reader must know.
    """

    question: str
    carried: Carried
    verdicts: Sequence[Verdict]
    more: Sequence[Table]
    notes: Sequence[str]

    @property
    def answer(self) -> str:
        """The headline's sentence."""
        return self.verdicts[0].sentence if self.verdicts else "nothing was scored"

    def tables(self) -> list[Table]:
        """All tables, scores first."""
        found = [table for verdict in self.verdicts for table in _score_tables(verdict)]
        found.append(Table("Cost, means over seeds", _cost_rows(self.carried.done)))
        found += self.more
        if self.carried.tried:
            found.append(Table("Learning rates, after shorter runs", rate_rows(self.carried.tried)))
        return found


def gather_notes(carried: Carried, settings: StudySettings) -> list[str]:
    """What a reader must know.

    Args:
        carried: The runs.
        settings: What was set.

    Returns:
        Sentences.
    """
    runs = [run for found in carried.done.values() for run in found]
    notes = edge_note(carried.tried)
    machines = {_machine(run) for run in runs}
    if len(machines) > 1:
        notes.append("The runs were made on different machines: times and memory do not compare.")
    versions = {str(sorted(run.result["versions"].items())) for run in runs}
    if len(versions) > 1:
        notes.append("The runs were made with different versions of the libraries.")
    if any(event["event"] == "trained_together" for run in runs for event in run.run.events()):
        notes.append(
            "Some runs trained together over one base: times and memory are of all of them and do not compare."
        )
    steps = {run.result["steps"] for run in runs}
    if len(steps) > 1:
        notes.append(f"Early stopping: the runs trained {min(steps):,} to {max(steps):,} steps.")
    seeds = ", ".join(map(str, settings.seeds))
    notes.append(
        f"Seeds {seeds}; rows and test examples by data seed {settings.data_seed}, the same for all runs; intervals of 95 %:"
        " over examples by the bootstrap, over seeds by Student's t. p: permutation test over examples, Holm's correction."
    )
    notes.append("Not decided: p is above 0.05, or an interval of the difference holds 0.")
    return notes


def _machine(run: DoneRun) -> str:
    """What times and memory depend on."""
    hardware = run.run.environment["hardware"]
    return str([hardware.get(key) for key in ("processor", "devices", "threads")])


def write_findings(findings: Findings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Show and write everything.

    Args:
        findings: What was found.
        folder: Where to.
        show: Is given each text for a person.

    Returns:
        The files.

    Raises:
        OutputError: They cannot be written.
    """
    from peftlab.study.page import render_study

    tables = findings.tables()
    for table in tables:
        show(render_text(table.rows, title=f"\n{table.title}"))
    show("")
    for note in findings.notes:
        show(note)
    show(f"\n{findings.question}")
    for verdict in findings.verdicts:
        show(f"  {verdict.sentence}")
    sentences = [f"- {verdict.sentence}" for verdict in findings.verdicts]
    parts = [f"{table.title}:\n\n{render_markdown(table.rows)}" for table in tables]
    whole = [
        f"**{findings.question}**",
        "\n".join(sentences),
        *parts,
        "\n".join(f"- {n}" for n in findings.notes),
    ]
    return [
        write_text(folder / TABLE, "\n\n".join(whole) + "\n"),
        write_json(folder / NUMBERS, to_json(findings)),
        write_text(folder / RUNS, _csv(findings)),
        write_text(folder / PAGE, render_study(findings)),
    ]


def to_json(findings: Findings) -> dict[str, Any]:
    """Every number, JSON-ready.

    Args:
        findings: What was found.
    """
    return {
        "question": findings.question,
        "answer": findings.answer,
        "metrics": {
            v.metric: {
                "unit": v.unit,
                "higher_is_better": v.higher_is_better,
                "values": {arm: list(values) for arm, values in v.values.items()},
                "scores": {arm: score.to_dict() for arm, score in v.scores.items()},
                "differences": [d.to_dict() for d in v.differences],
                "winner": v.winner,
                "withheld": v.withheld,
            }
            for v in findings.verdicts
        },
        "runs": {
            arm: [dict(run.result) | {"seed": run.planned.seed, "folder": str(run.planned.folder)} for run in runs]
            for arm, runs in findings.carried.done.items()
        },
        "tried": findings.carried.tried,
        "tables": {table.title: table.rows for table in findings.more},
        "notes": list(findings.notes),
    }  # fmt: skip


def _score_tables(verdict: Verdict) -> list[Table]:
    """One metric: every arm, and every pair where pairs were tested."""
    digits = 3 if verdict.unit == "rate" else 2
    rows = [["arm", "mean", "over seeds", "over examples", "each seed"]]
    for arm, values in verdict.values.items():
        score = verdict.scores.get(arm)
        each = " ".join(f"{value:.{digits}f}" for value in values)
        spans = (
            ["-", "-"]
            if score is None
            else [_span(i, digits) for i in (score.over_seeds, score.over_examples)]
        )
        rows.append([arm, f"{statistics.fmean(values):.{digits}f}", *spans, each])
    found = [Table(f"{verdict.metric} ({verdict.unit})", rows)]
    if verdict.differences:
        pairs = [["difference", "value", "over examples", "over seeds", "p", "verdict"]]
        for d in verdict.differences:
            spans = [_span(i, digits, "+") for i in (d.over_examples, d.over_seeds)]
            pairs.append(
                [f"{d.second} - {d.first}", f"{d.value:+.{digits}f}", *spans, f"{d.p_value:.4f}", d.verdict]
            )
        found.append(Table(f"{verdict.metric}, differences", pairs))
    return found


def _cost_rows(done: Mapping[str, Sequence[DoneRun]]) -> list[list[str]]:
    """What each arm costs."""
    header = "arm,learning rate,trainable,training,per sample,tokens/s,peak memory,on disk,validation loss"
    rows = [header.split(",")]
    for arm, runs in done.items():
        first = runs[0].result
        mean = {key: _mean(runs, key) for key in (*_COSTS, "validation_loss")}
        seconds, rate, loss = mean["seconds"], mean["tokens_per_second"], mean["validation_loss"]
        each = None if seconds is None else seconds / (first["steps"] * rows_per_step(runs[0]))
        rows.append(
            [
                arm,
                f"{first['learning_rate']:g}",
                show_count(first["trainable_parameters"], of=first["total_parameters"]),
                show_seconds(seconds),
                "-" if each is None else f"{each * 1000:.3g} ms",
                "-" if rate is None else f"{rate:,.0f}",
                show_bytes(mean["peak_memory_bytes"]),
                show_bytes(mean["adapter_bytes"]),
                "-" if loss is None else f"{loss:.4f}",
            ]
        )
    return rows


def rows_per_step(run: DoneRun) -> int:
    """Rows of one optimizer step.

    Args:
        run: The run.
    """
    return int(run.run.preflight["steps"]["rows_per_step"])


def _mean(runs: Sequence[DoneRun], key: str) -> float | None:
    """The mean of what the runs came to; None where one has no such number."""
    values = [run.result[key] for run in runs]
    return None if any(value is None for value in values) else statistics.fmean(values)


def _span(interval: tuple[float, float], digits: int, sign: str = "") -> str:
    """An interval."""
    return f"[{interval[0]:{sign}.{digits}f}, {interval[1]:{sign}.{digits}f}]"


def _csv(findings: Findings) -> str:
    """One line for each run."""
    stream = io.StringIO()
    names = [verdict.metric for verdict in findings.verdicts]
    writer = csv.writer(stream, lineterminator="\n")
    costs = ["learning_rate", "validation_loss", "steps", *_COSTS]
    writer.writerow(["arm", "seed", "run", *names, *costs])
    for arm, runs in findings.carried.done.items():
        for place, run in enumerate(runs):
            scores = [verdict.values[arm][place] for verdict in findings.verdicts]
            writer.writerow(
                [arm, run.planned.seed, run.result["run"], *scores, *(run.result[c] for c in costs)]
            )
    return stream.getvalue()
