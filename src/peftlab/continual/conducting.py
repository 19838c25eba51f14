"""Carry out the continual-learning experiment: every arm with every seed on the same tasks, then tables, charts and page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.catalog import METHODS
from peftlab.config import EMBEDDED_BASE, ModelSettings, RunConfig, TaskSettings, build_config
from peftlab.continual.answers import EVALUATION, Asked, ask, read_asked
from peftlab.continual.arms import Arm, make_arms
from peftlab.continual.course import Base, Course, Learned
from peftlab.continual.fixture import ANSWERS, write_fixture
from peftlab.continual.judging import gather_arm, judge_arms, shared_metrics
from peftlab.continual.lessons import Lesson, load_lessons
from peftlab.continual.telling import Findings, write_findings
from peftlab.errors import ConfigError
from peftlab.files import write_json
from peftlab.loading import ModelSource, find_model
from peftlab.loading import hash_tensors as hash_files
from peftlab.precision import settle_dtype

LANGUAGES = ("python", "javascript", "java")
EMBEDDED_RATE, USUAL_RATE = 8e-3, 2e-4
_RUNS = "runs"
Show = Callable[[str], object]


def conduct(question: str, settings: Any, folder: Path, show: Show) -> list[Path]:
    """Learn the tasks in every way, and write what came out.

    Args:
        question: What is asked.
        settings: The experiment's settings.
        folder: Where tables, charts and page go.
        show: Is given each text for a person.

    Returns:
        The files that were written.

    Raises:
        InputError: Model, tasks, methods or settings do not fit.
        RunError: A stage failed; what is finished stays.
        EvaluationError: A score cannot be computed, or equal weights answered in two ways.
    """
    show(question)
    directory = (settings.runs or folder.parent / _RUNS).expanduser().absolute()
    arms = make_arms(settings.methods, settings.plans, _adapter(settings))
    tasks = tasks_of(settings, directory / "tasks")
    model = _model(settings)
    source = find_model(model)
    model = _settle(model, source, [_config(settings, arm, tasks, model, seed=0)[0] for arm in arms])
    base = Base(source, model)
    lessons = load_lessons(
        tasks, source, seed=settings.data_seed,
        validation_rows=settings.validation_rows, eval_samples=settings.eval_samples,
    )  # fmt: skip
    for note in dict.fromkeys(note for lesson in lessons for note in lesson.notes):
        show(note)
    zero_shot = _ask_base(settings, base, lessons, directory)
    metrics = shared_metrics(zero_shot, settings.metric)
    tried = _choose_rates(settings, arms, lessons, base, tasks, directory, show)
    results = []
    for arm in arms:
        courses = [
            _carry_out(settings, arm, lessons, base, tasks, directory, show, seed=seed, tried=tried)
            for seed in settings.seeds
        ]
        results.append(gather_arm(arm, courses, lessons, zero_shot, metrics, seed=settings.data_seed))
    verdicts = judge_arms(
        results, lessons, metrics[0], seed=settings.data_seed, num_resamples=settings.resamples
    )
    findings = Findings(
        question, source.name, lessons, zero_shot, metrics, results, verdicts, settings, tried
    )
    return write_findings(findings, folder, show)


def tasks_of(settings: Any, folder: Path) -> dict[str, TaskSettings]:
    """The tasks in the order of learning.

    Args:
        settings: The experiment's settings.
        folder: Where the files of embedded tasks go.

    Returns:
        Label to what a config's section `task` holds.

    Raises:
        ConfigError: A label stands for nothing.
    """
    common = {"max_length": settings.max_length, "num_samples": settings.num_samples}
    if settings.configs:
        labels = settings.tasks or tuple(settings.configs)
        if unknown := [label for label in labels if label not in settings.configs]:
            raise ConfigError(
                f"tasks names {unknown[0]}, which configs does not hold: {', '.join(settings.configs)}"
            )
        values = {label: common | settings.configs[label] for label in labels}
    elif settings.code is not None:
        labels = settings.tasks or LANGUAGES
        if unknown := [label for label in labels if label not in LANGUAGES]:
            raise ConfigError(
                f"there are no functions in {unknown[0]}; tasks may name {', '.join(LANGUAGES)}"
            )
        place = {"name": settings.code_task, "data_dir": str(settings.code.expanduser().absolute())}
        values = {label: common | place | {"settings": {"language": label}} for label in labels}
    else:
        folders = write_fixture(settings.tasks or tuple(ANSWERS)[:3], folder)
        values = {label: common | {"name": "jsonl", "data_dir": str(path)} for label, path in folders.items()}
    return {label: build_config({"task": value}).task for label, value in values.items()}


def _model(settings: Any) -> ModelSettings:
    return ModelSettings(name=settings.model or EMBEDDED_BASE, dtype=settings.dtype, device=settings.device)


def _adapter(settings: Any) -> dict[str, Any]:
    """The methods' settings, without dropout where nothing is said of it."""
    has = any("dropout" in METHODS.load(name).Settings.model_fields for name in settings.methods)
    given: dict[str, Any] = settings.adapter
    return ({"dropout": 0.0} if has else {}) | given


def _settle(model: ModelSettings, source: ModelSource, configs: Sequence[RunConfig]) -> ModelSettings:
    """The base's dtype, one for all arms: half precision only where every one of them can have it."""
    found = [settle_dtype(config, source.config)[0].model for config in configs]
    wide = [settled for settled in found if settled.weights_dtype == "float32"]
    return (wide or found)[0]


def _config(
    settings: Any, arm: Arm, tasks: Mapping[str, TaskSettings], model: ModelSettings, *, seed: int,
    factor: float = 1.0, steps: int | None = None,
) -> list[RunConfig]:  # fmt: skip
    """The configs of an arm's stages."""
    rate = settings.learning_rate or (EMBEDDED_RATE if model.name == EMBEDDED_BASE else USUAL_RATE)
    whole = steps or settings.steps * (len(tasks) if arm.plan == "joint" else 1)
    shared = {
        "model": model.model_dump(),
        "method": {"name": arm.method, **arm.settings},
        "training": {
            "max_steps": whole,
            "batch_size": settings.batch_size,
            "learning_rate": float(f"{rate * arm.rate * factor:.3g}"),
            "warmup_steps": min(whole - 1, max(1, whole // 20)),
            "validation_steps": max(1, whole // 2),
            "keep_checkpoints": 1,
            "select_best": False,
            "trunk_cache_gigabytes": 0,
            "seed": seed,
        },
        "evaluation": {"batch_size": settings.eval_batch_size, "max_new_tokens": settings.max_new_tokens},
        "probes": {},
    }
    try:
        return [
            build_config(shared | {"task": task.model_dump() | {"seed": settings.data_seed}})
            for task in tasks.values()
        ]
    except ConfigError as error:
        raise ConfigError(f"{arm.name}: {error}") from None


def _place(directory: Path, name: str, told: Any, lessons: Sequence[Lesson], base: Base) -> Path:
    """The folder of what is decided by configs, rows and the base's weights; it says so in a file."""
    rows = {lesson.label: lesson.digest() for lesson in lessons}
    whole = {"told": told, "rows": rows, "base": hash_files(base.source)}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    folder = directory / f"{name.replace(' ', '-')}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "course.json", whole)
    return folder


def _plain(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Configs as plain values, without where results go."""
    return [config.model_dump(mode="json", exclude={"output": True}) for config in configs]


def _ask_base(settings: Any, base: Base, lessons: Sequence[Lesson], directory: Path) -> list[Asked]:
    """Row 0: the base's own answers."""
    tasks = {lesson.label: lesson.settings for lesson in lessons}
    configs = _config(settings, Arm("zero-shot", "joint", "full"), tasks, base.settings, seed=0)
    plain = [{key: one[key] for key in ("model", "task", "evaluation")} for one in _plain(configs)]
    folder = _place(directory, "zero-shot", plain, lessons, base)
    found = []
    for lesson, config in zip(lessons, configs, strict=True):
        place = folder / lesson.label
        if (place / EVALUATION).exists():
            found.append(read_asked(place, lesson.label))
        else:
            found.append(ask(base.model, lesson, base.source, config, place, weights=base.bits))
    return found


def _carry_out(
    settings: Any, arm: Arm, lessons: Sequence[Lesson], base: Base, tasks: Mapping[str, TaskSettings],
    directory: Path, show: Show, *, seed: int, tried: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Learned:  # fmt: skip
    """One course."""
    factor = chosen_factor(tried.get(arm.method, ()))
    configs = _config(settings, arm, tasks, base.settings, seed=seed, factor=factor)
    told = [
        arm.plan,
        seed,
        _plain(configs),
        settings.replay_share if arm.plan == "replay" else None,
        settings.recheck,
    ]
    folder = _place(directory, f"{arm.name}-seed{seed}", told, lessons, base)
    return Course(
        arm, seed, configs, lessons, base, folder, settings.replay_share, settings.recheck, show
    ).carry_out()


def chosen_factor(tried: Sequence[Mapping[str, Any]]) -> float:
    """The factor of the lowest validation loss, the first of equals; 1 where nothing was tried.

    Args:
        tried: What each factor came to.
    """
    return float(min(tried, key=lambda one: one["validation_loss"])["factor"]) if tried else 1.0


def _choose_rates(
    settings: Any, arms: Sequence[Arm], lessons: Sequence[Lesson], base: Base, tasks: Mapping[str, TaskSettings],
    directory: Path, show: Show,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Each method on the first task with every factor and the first seed; nothing where there is one factor."""
    if len(settings.factors) < 2:
        return {}
    first, seed = lessons[:1], settings.seeds[0]
    one_task = {first[0].label: tasks[first[0].label]}
    tried: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys(arm.method for arm in arms):
        arm = next(arm for arm in arms if arm.method == method)
        alone = Arm(f"{method} rate", "isolated", method, arm.settings, arm.rate)
        for factor in settings.factors:
            configs = _config(settings, alone, one_task, base.settings, seed=seed, factor=factor)
            folder = _place(directory, f"{alone.name}-seed{seed}", ["rate", _plain(configs)], first, base)
            course = Course(alone, seed, configs, first, base, folder, settings.replay_share, True, show)
            facts = course.learn_alone()
            tried.setdefault(method, []).append(
                {
                    "factor": factor,
                    "learning_rate": configs[0].training.learning_rate,
                    "validation_loss": facts["validation_loss"],
                }
            )
    return tried
