"""What the continual-learning experiment says: answer, tables as Markdown, all numbers as JSON and CSV, charts, a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.continual.answers import Asked
from peftlab.continual.judging import ArmResult, bounds_of, describe_measures, spread
from peftlab.continual.lessons import Lesson
from peftlab.continual.measures import MEASURES, average_forgetting
from peftlab.figures.continual import TaskScores, plot_score_matrix, plot_task_curves
from peftlab.files import write_json, write_text
from peftlab.run_series import edge_note, rate_rows, render_markdown
from peftlab.seeded_scores import over_seeds
from peftlab.study.scoring import Verdict
from peftlab.tables import render_text, show_bytes, show_count, show_seconds

TABLE, NUMBERS, MATRIX, PAGE = "table.md", "results.json", "matrix.csv", "report.html"
HEAT_MAP, CURVES = "matrix.png", "curves.png"
COST = "Cost, means over seeds"
BASE_ROW = "base"
Table = tuple[str, list[list[str]]]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the experiment came to.

    Attributes:
        question: What was asked.
        model: The base.
        lessons: The tasks, in the order of learning.
        zero_shot: The base's answers to each.
        metrics: The metrics, the headline first.
        results: The arms.
        verdicts: What may be said of them.
        settings: What was set.
        tried: Method to the learning rates that were tried; empty where there was nothing to choose.
    """

    question: str
    model: str
    lessons: Sequence[Lesson]
    zero_shot: Sequence[Asked]
    metrics: Sequence[str]
    results: Sequence[ArmResult]
    verdicts: Sequence[Verdict]
    settings: Any
    tried: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def unit(self) -> str:
        """The headline's unit."""
        return str(self.zero_shot[0].metrics[self.metrics[0]]["unit"])

    @property
    def digits(self) -> int:
        """Digits that the headline is shown with."""
        return 3 if self.unit == "rate" else 2

    def sentences(self) -> list[str]:
        """The answer: what may be said of the arms, and whether what is isolated was kept whole."""
        told = [verdict.sentence for verdict in self.verdicts]
        alone = ", ".join(result.arm.name for result in self.results if result.arm.isolated)
        if alone:
            what = "weights and answers" if self.settings.recheck else "weights"
            told.append(
                f"{alone}: the {what} of every task were the same after every later stage, bit by bit: forgetting is"
                " exactly 0" + ("" if self.settings.recheck else "; its answers were taken over")
            )
        return told

    def tables(self) -> list[Table]:
        """All tables, the measures first."""
        head, unit = self.metrics[0], self.unit
        found: list[Table] = [(f"Measures of {head} ({unit}), means over seeds", _measure_rows(self))]
        for result in self.results:
            found.append(
                (f"{result.arm.name}: {head} of each task after each stage", _matrix_rows(self, result))
            )
        found += [
            (f"{verdict.metric}, differences", _difference_rows(verdict, self.digits))
            for verdict in self.verdicts
            if verdict.differences
        ]
        if self.tried:
            found.append(("Learning rates, on the first task", rate_rows(self.tried)))
        return [*found, (COST, _cost_rows(self.results))]

    def notes(self) -> list[str]:
        """What a reader must know."""
        settings, head = self.settings, self.metrics[0]
        higher = bool(self.zero_shot[0].metrics[head]["higher_is_better"])
        better = "higher" if higher else "lower"
        order, seeds = (
            " -> ".join(lesson.label for lesson in self.lessons),
            ", ".join(map(str, settings.seeds)),
        )
        counts = {len(lesson.test_examples) for lesson in self.lessons}
        asked = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
        notes = [
            *edge_note(self.tried),
            f"Base: {self.model}. Order: {order}. {settings.steps} steps of {settings.batch_size} rows for each task; joint"
            f" learning takes {settings.steps * len(self.lessons)} steps. {asked} test examples of each task, greedy"
            f" decoding, the same for all arms; seeds {seeds}, data seed {settings.data_seed}.",
            f"{head}: {better} is better. Average: over tasks, after the last stage. Backward transfer: last score less the"
            " one right after learning, over all tasks but the last (Lopez-Paz and Ranzato 2017). Forward transfer: score"
            " just before learning less the base's, over all tasks but the first (same paper, with the base in place of a"
            " random start).",
            "Forgetting: the best score from learning on, before the last stage, less the last (Chaudhry et al. 2018, whose"
            " maximum also looks at stages before the task was learned; results.json has both). Retention: last score over"
            " the one right after learning, at most 1, the mean over tasks; not defined where nothing was learned.",
            "Intervals of 95 %: over seeds Student's t, over examples the bootstrap. p: permutation test over the examples"
            " of all tasks, Holm's correction. Not decided: p above 0.05, or an interval of the difference holds 0.",
        ]
        if any(result.arm.plan == "replay" for result in self.results):
            notes.append(
                f"Replay: {settings.replay_share:.0%} of the rows of a stage are old ones, so its own task is seen the less."
            )
        return [*notes, *self._differing()]

    def _differing(self) -> list[str]:
        """Where the paper's forgetting is another number."""
        told = []
        for result in self.results:
            pairs = [
                (average_forgetting(m).value, average_forgetting(m, from_learning=False).value)
                for m in result.matrices[self.metrics[0]]
            ]
            if any(a != b for a, b in pairs):
                values = ", ".join("-" if b is None else f"{b:.{self.digits}f}" for _, b in pairs)
                told.append(
                    f"{result.arm.name}: with stages before learning counted, as in the paper, forgetting is {values} (by"
                    " seed): a task scored better before it was learned"
                )
        return told


def write_findings(findings: Findings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Show and write everything.

    Args:
        findings: What was found.
        folder: Where.
        show: Is given each text for a person.

    Returns:
        The files.

    Raises:
        OutputError: A file cannot be written.
    """
    from peftlab.continual.page import render_continual

    tables = findings.tables()
    for title, rows in tables:
        show("\n" + render_text(rows, title=title))
    for note in findings.notes():
        show(note)
    show(f"\n{findings.question}")
    for sentence in findings.sentences():
        show(f"  {sentence}")
    parts = [
        f"**{findings.question}**",
        "\n".join(f"- {sentence}" for sentence in findings.sentences()),
        *(f"{title}:\n\n{render_markdown(rows)}" for title, rows in tables),
        "\n".join(f"- {note}" for note in findings.notes()),
    ]
    drawn = [task_scores(findings, result) for result in findings.results]
    head = findings.metrics[0]
    charts = plot_score_matrix(drawn, folder / HEAT_MAP, metric=head, unit=findings.unit)
    charts += plot_task_curves(drawn, folder / CURVES, metric=head, unit=findings.unit)
    return [
        write_text(folder / TABLE, "\n\n".join(parts) + "\n"),
        write_json(folder / NUMBERS, to_json(findings)),
        write_text(folder / MATRIX, _csv(findings)),
        *charts,
        write_text(folder / PAGE, render_continual(findings, folder)),
    ]


def task_scores(findings: Findings, result: ArmResult) -> TaskScores:
    """An arm's matrix as charts take it, the base's row first.

    Args:
        findings: What was found.
        result: The arm.
    """
    matrices = result.matrices[findings.metrics[0]]
    mean, labels = result.mean_matrix(findings.metrics[0]), matrices[0].tasks
    single = len(mean.after) == 1 and len(labels) > 1
    stages = (BASE_ROW, *(("all",) if single else labels))
    spans: list[tuple[tuple[float, float] | None, ...]] = [tuple(None for _ in labels)]
    for stage in range(len(mean.after)):
        cells = [[matrix.after[stage][task] for matrix in matrices] for task in range(len(labels))]
        spans.append(tuple(over_seeds(cell) if len(cell) > 1 else None for cell in cells))
    learned = tuple(1 if single else place + 1 for place in range(len(labels)))
    rows = (mean.zero_shot, *mean.after)
    return TaskScores(result.arm.name, stages, labels, rows, tuple(spans), learned)


def to_json(findings: Findings) -> dict[str, Any]:
    """Every number, JSON-ready.

    Args:
        findings: What was found.
    """
    return {
        "question": findings.question,
        "answer": findings.sentences(),
        "model": findings.model,
        "tasks": [lesson.label for lesson in findings.lessons],
        "metrics": list(findings.metrics),
        "zero_shot": {one.label: dict(one.metrics) for one in findings.zero_shot},
        "arms": {result.arm.name: _arm_json(findings, result) for result in findings.results},
        "verdicts": {
            verdict.metric: {
                "values": {arm: list(values) for arm, values in verdict.values.items()},
                "scores": {arm: score.to_dict() for arm, score in verdict.scores.items()},
                "differences": [difference.to_dict() for difference in verdict.differences],
                "winner": verdict.winner,
                "withheld": verdict.withheld,
            }
            for verdict in findings.verdicts
        },
        "tried": {method: list(tried) for method, tried in findings.tried.items()},
        "notes": findings.notes(),
    }


def _arm_json(findings: Findings, result: ArmResult) -> dict[str, Any]:
    """One arm."""
    found: dict[str, Any] = {
        "plan": result.arm.plan,
        "method": result.arm.method,
        "settings": dict(result.arm.settings),
        "folders": [str(course.folder) for course in result.courses],
        "stages": [[dict(stage) for stage in course.stages] for course in result.courses],
        "measures": {metric: describe_measures(result, metric) for metric in findings.metrics},
        "matrices": {m: [matrix.after for matrix in result.matrices[m]] for m in findings.metrics},
    }
    head = result.matrices[findings.metrics[0]]
    found["forgetting_over_all_stages"] = [average_forgetting(m, from_learning=False).to_dict() for m in head]
    return found


def _measure_rows(findings: Findings) -> list[list[str]]:
    """The measures of every arm; the base's average alone."""
    metric, digits = findings.metrics[0], findings.digits
    rows = [["arm", *MEASURES]]
    zero = [float(one.metrics[metric]["value"]) for one in findings.zero_shot]
    rows.append(
        ["base, nothing learned", f"{sum(zero) / len(zero):.{digits}f}", *["-"] * (len(MEASURES) - 1)]
    )
    for result in findings.results:
        cells = []
        for name, measures in result.measures(metric).items():
            mean, interval = spread([measure.value for measure in measures], within=bounds_of(name))
            cells.append(_cell(mean, interval, digits if name != "retention" else 3))
        rows.append([result.arm.name, *cells])
    return rows


def _cell(mean: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    """A mean with its interval; a dash where it is not defined."""
    if mean is None:
        return "-"
    value = mean + 0.0  # no minus before a zero
    span = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{value:.{digits}f}{span}"


def _matrix_rows(findings: Findings, result: ArmResult) -> list[list[str]]:
    """One arm's matrix, the mean over seeds."""
    drawn, digits = task_scores(findings, result), findings.digits
    rows = [["after", *drawn.tasks]]
    for stage, values in zip(drawn.stages, drawn.rows, strict=True):
        rows.append([stage, *(f"{value:.{digits}f}" for value in values)])
    return rows


def _difference_rows(verdict: Verdict, digits: int) -> list[list[str]]:
    """Every pair of arms."""
    rows = [["difference", "value", "over examples", "over seeds", "p", "verdict"]]
    for d in verdict.differences:
        spans = [f"[{low:+.{digits}f}, {high:+.{digits}f}]" for low, high in (d.over_examples, d.over_seeds)]
        rows.append(
            [f"{d.second} - {d.first}", f"{d.value:+.{digits}f}", *spans, f"{d.p_value:.4f}", d.verdict]
        )
    return rows


def _cost_rows(results: Sequence[ArmResult]) -> list[list[str]]:
    """What each arm trains, keeps and takes."""
    rows = [["arm", "trainable", "kept for all tasks", "steps", "training"]]
    for result in results:
        stages = [stage for course in result.courses for stage in course.stages]
        seconds = sum(float(stage["seconds"]) for stage in stages) / len(result.courses)
        first = result.courses[0].stages
        rows.append(
            [
                result.arm.name,
                show_count(int(first[0]["trainable_parameters"])),
                show_bytes(len(first) * int(first[0]["own_bytes"]) + int(first[0]["shared_bytes"])),
                str(sum(int(stage["steps"]) for stage in first)),
                show_seconds(seconds),
            ]
        )
    return rows


def _csv(findings: Findings) -> str:
    """One line for each cell of each matrix."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    header = ["metric", "arm", "seed", "stage", "after", "task", "score", "low", "high", "learned", "weights"]
    writer.writerow(header)
    for metric in findings.metrics:
        for one in findings.zero_shot:
            writer.writerow(
                [metric, BASE_ROW, "", 0, "", one.label, *_numbers(one, metric), "no", one.weights[:12]]
            )
        for result in findings.results:
            for course in result.courses:
                for stage, asked in enumerate(course.asked):
                    after = "+".join(course.stages[stage]["tasks"])
                    for place, one in enumerate(asked):
                        known = "yes" if len(course.asked) == 1 or place <= stage else "no"
                        line = [metric, result.arm.name, course.seed, stage + 1, after, one.label]
                        writer.writerow([*line, *_numbers(one, metric), known, one.weights[:12]])
    return stream.getvalue()


def _numbers(asked: Asked, metric: str) -> list[Any]:
    """A score and its interval over examples."""
    score = asked.metrics[metric]
    low, high = score.get("interval") or ("", "")
    return [score["value"], low, high]
