"""What does one recipe reach on each task? The base before and the adapter after, on tasks of different kinds.

S1's table of tasks. Scores of different tasks do not compare with each other; each is compared with its own base, example by
example, over all seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from peftlab.catalog import METHODS, TASKS
from peftlab.config import EMBEDDED_TASK
from peftlab.files import write_json, write_text
from peftlab.run_series import render_markdown
from peftlab.seeded_scores import SeededScore, compare_all, gather
from peftlab.study.carrying import DoneRun, carry_out_planned
from peftlab.study.conducting import runs_folder
from peftlab.study.planning import PlannedRun, make_config
from peftlab.study.scoring import LEAST_SEEDS, rescore
from peftlab.study.settings import StudySettings
from peftlab.tables import render_text, show_count, show_seconds

QUESTION = "What does one recipe reach on each task?"


def _embedded() -> dict[str, Path | None]:
    """The task that needs no data."""
    return {EMBEDDED_TASK: None}


class Settings(StudySettings):
    """What can be set on the table."""

    tasks: dict[str, Path | None] = Field(default_factory=_embedded, min_length=1)
    """Tasks and the folders of their data: `--set tasks.e2e_nlg=DIR --set tasks.samsum=DIR`."""
    method: str = "lora"
    """The method."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, Path | None]) -> dict[str, Path | None]:
        return {TASKS.check(name): folder for name, folder in tasks.items()}

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        return METHODS.check(method)


def carry_out(settings: Settings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Train on each task, score base and adapter.

    Args:
        settings: What was set.
        folder: Where tables go.
        show: Is given each text for a person.

    Returns:
        `table.md` and `tasks.json`.

    Raises:
        ConfigError: A config is not valid.
        RunError: A run failed; the finished ones stay.
        EvaluationError: A score cannot be computed.
    """
    directory = runs_folder(settings, folder)
    planned = [
        PlannedRun(task, seed, _config(settings, task, data, directory, seed))
        for task, data in settings.tasks.items()
        for seed in settings.seeds
    ]
    results = carry_out_planned(planned, folder / "configs", show)
    done: dict[str, list[DoneRun]] = {}
    for run, result in zip(planned, results, strict=True):
        done.setdefault(run.arm, []).append(DoneRun(run, result))
    found = {task: _compare(runs, settings) for task, runs in done.items()}
    rows = [
        ["task", "metric", "before", "after", "difference", "over examples", "over seeds", "p", "verdict"]
    ]
    for task, metrics in found.items():
        rows += [[task, name, *one["cells"]] for name, one in metrics.items()]
    costs = [["task", "test examples", "trainable", "training"]]
    for task, runs in done.items():
        first = runs[0].result
        count = next(iter(first["metrics"].values()))["count"]
        share = show_count(first["trainable_parameters"], of=first["total_parameters"])
        costs.append([task, f"{count:,}", share, show_seconds(first["seconds"])])
    few = len(settings.seeds) < LEAST_SEEDS
    notes = [
        f"Seeds {', '.join(map(str, settings.seeds))}; intervals of 95 %, Holm's correction within a task."
    ] + (
        [f"With {len(settings.seeds)} seed(s) nothing is called better; from {LEAST_SEEDS} on it may be."]
        if few
        else []
    )
    show(render_text(rows, title=f"\n{QUESTION}"))
    show(render_text(costs, title="\ncost"))
    for note in notes:
        show(note)
    parts = [f"**{QUESTION}**", render_markdown(rows), render_markdown(costs), *notes]
    numbers = {task: {n: one["numbers"] for n, one in metrics.items()} for task, metrics in found.items()}
    return [
        write_text(folder / "table.md", "\n\n".join(parts) + "\n"),
        write_json(folder / "tasks.json", {"tasks": numbers, "notes": notes}),
    ]


def _config(settings: Settings, task: str, data: Path | None, directory: Path, seed: int) -> Any:
    """The config of one run, scored before and after."""
    place = None if data is None else str(Path(data).expanduser().absolute())
    changes = {
        "task.name": task, "task.data_dir": place, "method.name": settings.method, "schedule.strategy": None,
    }  # fmt: skip
    return make_config(task, changes, settings, directory, seed=seed, before=True)


def _compare(runs: list[DoneRun], settings: Settings) -> dict[str, dict[str, Any]]:
    """Every metric of one task: before, after, and what may be said of the difference."""
    halves = {when: [rescore(run.run, when) for run in runs] for when in ("before", "after")}
    found: dict[str, dict[str, Any]] = {}
    for name, score in halves["after"][0].items():
        digits = 3 if score.unit == "rate" else 2
        values = {when: [half[name].value for half in found_] for when, found_ in halves.items()}
        means = {when: sum(v) / len(v) for when, v in values.items()}
        value = means["after"] - means["before"]
        cells = [f"{means['before']:.{digits}f}", f"{means['after']:.{digits}f}", f"{value:+.{digits}f}"]
        numbers: dict[str, Any] = {"unit": score.unit, "values": values, "difference": None}
        if len(runs) >= LEAST_SEEDS and score.rows is not None and score.count > 1:
            both: dict[str, SeededScore] = {
                when: gather([half[name] for half in halves[when]], seed=settings.data_seed)
                for when in halves
            }
            (d,) = compare_all(both, seed=settings.data_seed, num_resamples=settings.resamples)
            spans = [
                f"[{low:+.{digits}f}, {high:+.{digits}f}]" for low, high in (d.over_examples, d.over_seeds)
            ]
            cells += [*spans, f"{d.p_value:.4f}", d.verdict]
            numbers["difference"] = d.to_dict()
        else:
            cells += ["-", "-", "-", "no winner is named"]
        found[name] = {"cells": cells, "numbers": numbers}
    return found
