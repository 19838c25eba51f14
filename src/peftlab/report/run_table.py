"""Several runs as one table with a row for each: what came out and what it cost, to sort, and as CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftlab.comparison import Comparison, evaluation_of, metrics_of, status_of
from peftlab.report.pareto_chart import Point, draw_pareto
from peftlab.report.sortable import Cell, sortable_table
from peftlab.run import RunFolder
from peftlab.tables import show_bytes, show_count, show_score, show_seconds

Facts = dict[str, Any]
_COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("trainable_parameters", "trainable parameters", lambda v: show_count(round(v))),
    ("train_seconds", "training time", show_seconds),
    ("peak_memory_bytes", "peak memory", show_bytes),
)


def run_facts(label: str, run: RunFolder) -> Facts:
    """What one run came to and cost.

    Args:
        label: What it is called.
        run: The run, finished or not.

    Returns:
        JSON-ready; None where there is no such number yet. "metrics" holds scores after training.

    Raises:
        RunError: A file is damaged.
    """
    summary: Mapping[str, Any] = run.summary() if run.has(RunFolder.SUMMARY) else {}
    memory = summary.get("peak_memory_bytes") or {}
    best, config = summary.get("best_checkpoint"), run.config if run.has(RunFolder.CONFIG) else {}
    return {
        "run": label,
        "folder": str(run.path),
        "status": status_of(run),
        "methods": [adapter["method"] for adapter in config.get("adapters", [])],
        "metrics": metrics_of(evaluation_of(run), "after"),
        "validation_loss": best["validation_loss"] if best else None,
        "trainable_parameters": (summary.get("counts") or {}).get("trainable_parameters"),
        "steps": summary.get("steps"),
        "train_seconds": (summary.get("seconds") or {}).get("train"),
        "tokens_per_second": summary.get("tokens_per_second"),
        "peak_memory_bytes": max((v for v in memory.values() if v is not None), default=None),
    }


def all_facts(comparison: Comparison) -> list[Facts]:
    """What every run came to and cost.

    Args:
        comparison: The runs.

    Raises:
        RunError: A file is damaged.
    """
    return [run_facts(label, run) for label, run in zip(comparison.labels, comparison.runs, strict=True)]


def metric_names(facts: Sequence[Facts]) -> list[str]:
    """The metrics that any run has, in their order.

    Args:
        facts: The runs.
    """
    return list(dict.fromkeys(name for one in facts for name in one["metrics"]))


def draw_runs(facts: Sequence[Facts], pages: Sequence[str | None]) -> str:
    """The table, to sort.

    Args:
        facts: The runs.
        pages: Where each run's own page is.

    Returns:
        HTML.
    """
    names = metric_names(facts)
    header = ["run", "status", *names, "validation loss", *(name for _, name, _ in _COSTS)]
    rows = []
    for one, page in zip(facts, pages, strict=True):
        row = [Cell(one["run"], link=page), Cell(one["status"])]
        for name in names:
            score = one["metrics"].get(name)
            row.append(Cell("-", "") if score is None else Cell(show_score(score), score["value"]))
        loss = one["validation_loss"]
        row.append(Cell("-", "") if loss is None else Cell(f"{loss:.4f}", loss))
        for key, _, show in _COSTS:
            row.append(Cell("-", "") if one[key] is None else Cell(show(one[key]), one[key]))
        rows.append(row)
    return sortable_table(header, rows)


def draw_costs(facts: Sequence[Facts]) -> str:
    """The first metric against parameters, time and memory.

    Args:
        facts: The runs.

    Returns:
        HTML; "" where fewer than two runs have a score.
    """
    names = metric_names(facts)
    scored = [one for one in facts if names and names[0] in one["metrics"]]
    if len(scored) < 2:
        return ""
    parts = []
    for key, name, show in _COSTS:
        points = [
            Point(one["run"], float(one[key]), score["value"], _interval(score))
            for one in scored
            if one[key]
            for score in (one["metrics"][names[0]],)
        ]
        first = scored[0]["metrics"][names[0]]
        drawn = draw_pareto(
            points,
            cost=name,
            score=f"{names[0]} ({first['unit']})",
            show_cost=show,
            higher_is_better=bool(first["higher_is_better"]),
        )
        parts.append(f"<h3>{name.capitalize()}</h3>{drawn}")
    return "".join(parts)


def to_csv(facts: Sequence[Facts]) -> str:
    """One line for each run, numbers as they are; empty where there is none.

    Args:
        facts: The runs.
    """
    names = metric_names(facts)
    plain = [key for key in facts[0] if key not in ("metrics", "methods")] if facts else []
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ends = [f"{name} {end}" for name in names for end in ("value", "low", "high")]
    writer.writerow([*plain, "methods", *ends])
    for one in facts:
        scores: list[Any] = []
        for name in names:
            score = one["metrics"].get(name) or {}
            scores += [score.get("value"), *(_interval(score) or (None, None))]
        writer.writerow([*(one[key] for key in plain), " ".join(one["methods"]), *scores])
    return stream.getvalue()


def _interval(score: Mapping[str, Any]) -> tuple[float, float] | None:
    """A score's interval, where it has one."""
    found = score.get("interval")
    return (found[0], found[1]) if found else None
