"""Which settings learn best? A space of config keys gone through as a grid, at random, or by Optuna's TPE with pruning.

Trials are judged by their validation loss alone; test answers are never looked at while choosing. Where `confirm` is set,
the best point is trained anew with the seeds of `confirm`, beside the config as it was, and both are scored: a point that
was the luckiest of many falls back there. Trials that are finished are not done again; a sweep that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from peftlab.errors import InputError
from peftlab.files import write_json, write_text
from peftlab.run_series import render_markdown
from peftlab.settings import validate
from peftlab.study.conducting import compare_arms, runs_folder
from peftlab.study.search import Trial, Trials, ask_optuna, show_point
from peftlab.study.settings import Seeds, StudySettings
from peftlab.study.space import GRIDS, grid_points, random_points, read_space
from peftlab.tables import render_text, show_bytes, show_count, show_seconds

QUESTION = "Which settings learn best?"
_MOST_SHOWN, _TRIALS = 20, 20


class Settings(StudySettings):
    """What can be set on a sweep."""

    space: dict[str, Any] = Field(default_factory=dict)
    """Config keys to lists of values or ranges: `--set space.method.rank=[4,8]`, `--set 'space.training.learning_rate={low:
    1e-4, high: 1e-2, log: true}'`."""
    grid: Literal["lora", "p_tuning", "adalora"] | None = None
    """One of the efficient fine-tuning document's grids, instead of a space."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """How points are chosen; tpe needs Optuna."""
    trials: int | None = Field(default=None, ge=1)
    """How many points; none is all of a grid, and 20 of the others."""
    prune: bool = False
    """Whether Optuna ends runs that are worse than the median of the others at the same validation."""
    storage: str | None = None
    """Optuna's storage: a file, or a URL such as postgresql://... that several machines share; none is a file beside the
    runs."""
    study: str = "sweep"
    """The study's name in the storage."""
    seeds: Seeds = (1,)
    """Seeds of each trial; its value is the mean over them."""
    confirm: int = Field(default=0, ge=0, le=10)
    """Seeds with which the best point is compared with the config as it was, test answers and all; 0 compares nothing."""

    @model_validator(mode="after")
    def _has_space(self) -> Settings:
        if self.space and self.grid is not None:
            raise ValueError("give a space or a grid, one of both")
        if self.sampler != "tpe" and (self.prune or self.storage is not None):
            raise ValueError("prune and storage belong to sampler=tpe")
        if self.grid is not None and self.sampler != "grid":
            raise ValueError("a document's grid is gone through as a grid; give a space for other samplers")
        read_space(self.space)
        return self


def carry_out(settings: Settings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Go through the space and tell what learned best.

    Args:
        settings: What was set.
        folder: Where tables go.
        show: Is given each text for a person.

    Returns:
        The files.

    Raises:
        InputError: The space does not fit, or Optuna is asked for and not installed.
        RunError: A run failed; the finished ones stay.
    """
    if not settings.space and settings.grid is None:
        raise InputError(
            "a sweep needs a space or a grid: --set 'space.method.rank=[4, 8]', or --set grid=lora (p_tuning, adalora)"
        )
    axes = read_space(settings.space)
    directory = runs_folder(settings, folder)
    common = validate(StudySettings, settings.model_dump(include=set(StudySettings.model_fields)))
    trials = Trials(common, directory, folder / "configs", show)
    count = settings.trials or _TRIALS
    if settings.sampler == "tpe":
        storage = settings.storage or directory / "optuna" / f"{settings.study}.log"
        ask_optuna(
            trials, axes, count=count, seed=settings.data_seed, storage=storage, name=settings.study,
            prune=settings.prune,
        )  # fmt: skip
    elif settings.sampler == "random":
        for point in islice(random_points(axes, seed=settings.data_seed), count):
            trials.carry_out(point)
    else:
        spaces = GRIDS[settings.grid] if settings.grid else (settings.space,)
        points = [point for space in spaces for point in grid_points(read_space(space))]
        for point in points[: settings.trials]:
            trials.carry_out(point)
    ranked = sorted((t for t in trials.done if t.value is not None), key=lambda trial: trial.value or 0.0)
    if not ranked:
        raise InputError(
            "no trial gave a validation loss: "
            + "; ".join(dict.fromkeys(t.note for t in trials.done if t.note))
        )
    files = _write(folder, trials.done, ranked, show)
    return files + (_confirm(ranked[0], settings, common, folder, show) if settings.confirm else [])


def _write(folder: Path, done: list[Trial], ranked: list[Trial], show: Callable[[str], object]) -> list[Path]:
    """Write and show the tables."""
    front = _front(ranked)
    keys = list(dict.fromkeys(key for trial in ranked for key in trial.point))
    rows = [["", *keys, "validation loss", "trainable", "training", "peak memory", "beaten by none"]]
    for place, trial in enumerate(ranked, start=1):
        first: Mapping[str, Any] = trial.results[0] if trial.results else {}
        rows.append(
            [
                str(place),
                *(str(trial.point.get(key, "-")) for key in keys),
                f"{trial.value:.4f}",
                show_count(first.get("trainable_parameters")),
                show_seconds(first.get("seconds")),
                show_bytes(first.get("peak_memory_bytes")),
                "yes" if trial in front else "",
            ]
        )
    best = " ".join(f"--set {key}={value}" for key, value in ranked[0].point.items())
    notes = [
        f"best of {len(done)}: {best}",
        "The lowest of many validation losses is too low by luck: what it is worth, a comparison with fresh seeds says"
        " (--set confirm=3).",
        "Beaten by none: no other trial has both fewer trainable parameters and a lower loss.",
        *(f"no value: {show_point(t.point)}: {t.note}" for t in done if t.value is None),
    ]
    show(render_text(rows[: _MOST_SHOWN + 1], title="\nlowest validation loss first"))
    for note in ("", *notes):
        show(note)
    numbers = [
        {"point": t.point, "value": t.value, "note": t.note, "runs": [dict(r) for r in t.results]}
        for t in done
    ]
    return [
        write_text(folder / "table.md", "\n\n".join([render_markdown(rows), *notes]) + "\n"),
        write_json(folder / "trials.json", {"trials": numbers, "best": ranked[0].point}),
    ]


def _front(ranked: list[Trial]) -> list[Trial]:
    """Trials that no other beats in both parameters and loss, from the lowest loss on."""
    kept: list[Trial] = []
    fewest = float("inf")
    for trial in ranked:
        if trial.results and trial.results[0]["trainable_parameters"] < fewest:
            fewest = trial.results[0]["trainable_parameters"]
            kept.append(trial)
    return kept


def _confirm(
    best: Trial, settings: Settings, common: StudySettings, folder: Path, show: Callable[[str], object]
) -> list[Path]:
    """Compare the best point with the config as it was, with fresh seeds."""
    first = max(settings.seeds) + 1
    fresh = tuple(range(first, first + settings.confirm))
    place = folder / "confirmed"
    place.mkdir()
    return compare_arms(
        "Is the best point of the sweep better than the config as it was, with fresh seeds?",
        {"as it was": {}, "best": dict(best.point)},
        common.model_copy(update={"seeds": fresh, "runs": runs_folder(settings, folder)}),
        place,
        show,
    )
