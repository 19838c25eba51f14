"""From a config to everything a run needs, before any weight is read: all that can be wrong is found here.

The model is built on the meta device, the adapter is attached to it there, and the phases are fitted: so the pre-flight's
counts are those of the run itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from peftlab.attaching.describing import describe_adapters, note_ranks
from peftlab.attaching.towers import attach_adapters
from peftlab.batches import EpochOrder, Row, RowBuilder, RowCount
from peftlab.catalog import METHODS, TASKS
from peftlab.commands.preconditions import check_places
from peftlab.config import AdapterSettings, RunConfig
from peftlab.decoding import check_asked
from peftlab.devices import choose_device, choose_dtype, num_processes
from peftlab.errors import ConfigError, DataError, OutputError
from peftlab.loading import ModelSource, find_model, meta_model, switch_checkpointing
from peftlab.mapping import map_model
from peftlab.passes import foretell_trunk
from peftlab.phases import PhaseSwitch
from peftlab.precision import settle_dtype
from peftlab.schedule import Schedule
from peftlab.task import Example, Splits, choose
from peftlab.task_data import load_splits

_BYTES_PER_TRAINED_PARAMETER = 12
"""A checkpoint holds each trained parameter and AdamW's two moments in float32."""
_BYTES_BESIDE = 64 << 20


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run, ready to start.

    Attributes:
        config: What was asked for.
        task: The task's module.
        splits: The task's data.
        source: The base, not loaded yet.
        train_rows: Rows to train on.
        validation_rows: Rows for the validation loss.
        test_examples: Examples to score.
        schedule: What trains when.
        preflight: `preflight.json`.
    """

    config: RunConfig
    task: ModuleType
    splits: Splits
    source: ModelSource
    train_rows: list[Row]
    validation_rows: list[Row]
    test_examples: list[Example]
    schedule: Schedule
    preflight: dict[str, Any]


def resolve(config: RunConfig) -> Resolved:
    """Check a config against its data, its model and this machine.

    Args:
        config: What is asked for.

    Returns:
        The run, ready to start.

    Raises:
        InputError: Data, model, targets, phases or output do not fit; says what and what to do.
    """
    config = _absolute(config)
    check_places(config)
    _check_trackers(config.training.trackers)
    task = _load_task(config.task.name)
    seed = config.data_seed
    splits = load_splits(config.task, seed=seed)
    source = find_model(config.model, num_labels=len(splits.labels) or None, as_texts=splits.as_texts)
    splits = splits.for_head(source.head)
    config, dtype = settle_dtype(config, source.config)
    if config.evaluation.enabled:
        check_asked(task, source.head, config.evaluation)
    builder = RowBuilder(
        source.tokenizer, prompt=task.PROMPT, head=source.head, max_length=config.task.max_length
    )
    wanted, limit = config.task.num_samples, config.training.validation_rows
    train, train_count = builder.build(
        choose(splits.train, _all_of(splits.train, wanted), seed=seed), limit=wanted
    )
    validation, validation_count = builder.build(
        choose(splits.validation, len(splits.validation), seed=seed), limit=limit
    )
    counts = {"train": train_count, "validation": validation_count}
    _check_rows(counts)
    test = choose(splits.test, config.evaluation.num_samples, seed=seed)
    if config.evaluation.enabled and not test:
        raise DataError(
            f"task '{config.task.name}' has no test examples to score; turn evaluation off (--no_eval)"
        )
    if config.evaluation.enabled:
        counts["test"] = builder.build(test)[1]
    _check_positions(config, source, max(train_count.longest, validation_count.longest))
    schedule = config.make_schedule()
    structure = _structure(config, source, schedule, (train, validation))
    _check_space(config.output.directory, structure["trainable"], config.training.keep_checkpoints)
    preflight = {
        "task": config.task.name,
        "model": {"name": source.name, "class": structure["class"], "head": source.head},
        "dtype": {"name": config.model.weights_dtype, "reason": dtype.reason},
        "adapters": structure["adapters"],
        "rows": {
            "train": _describe(train_count),
            "validation": _describe(validation_count),
            "test": len(test),
        },
        "tokens": {
            "train": train_count.tokens,
            "labelled_share": train_count.labelled_tokens / train_count.tokens,
            "longest": train_count.longest,
        },
        "steps": _describe_steps(config, len(train)),
        "phases": structure["phases"],
        "parameters": {
            "total": structure["total"],
            "trainable": structure["trainable"],
            "trainable_tensors": structure["tensors"],
        },
        "notes": [*splits.notes, *_lost(counts), *structure["notes"], *_note_intervals(config, schedule)],
    }
    return Resolved(config, task, splits, source, train, validation, test, schedule, preflight)


def _all_of(examples: Sequence[Example], limit: int | None) -> int | None:
    """Where rows are limited, every example in the seeded order: how many rows one gives is not known yet."""
    return None if limit is None else len(examples)


def _absolute(config: RunConfig) -> RunConfig:
    """The config with folders as absolute paths, so that it means the same from every folder."""
    name, data_dir = config.model.name, config.task.data_dir
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().absolute())
    if data_dir is not None:
        data_dir = data_dir.expanduser().absolute()
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": name}),
            "task": config.task.model_copy(update={"data_dir": data_dir}),
        }
    )


def _check_positions(config: RunConfig, source: ModelSource, longest: int) -> None:
    """Refuse rows, answers and virtual tokens that are longer than the model's positions."""
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    virtual, method = max((_virtual_tokens(adapter), adapter.method) for adapter in config.adapters)
    if virtual >= positions:
        raise ConfigError(
            f"the {virtual} virtual tokens of method {method} (num_virtual_tokens) fill all {positions} positions of"
            f" '{source.name}', so no text fits behind them; use fewer, some tens are usual: with rows of up to {longest}"
            f" tokens at most {max(0, positions - longest)}"
        )
    answer = config.evaluation.answer_tokens(TASKS.load(config.task.name))
    before = f" behind {virtual} virtual ones" if virtual else ""
    if longest + virtual > positions:
        fewer = ", or use fewer virtual tokens" if virtual else ""
        raise ConfigError(
            f"rows have up to {longest} tokens{before} but '{source.name}' has {positions} positions; set task.max_length"
            f" (--max_length) to {positions - virtual} or less{fewer}"
        )
    if config.evaluation.enabled and source.head == "causal" and answer + virtual >= positions:
        raise ConfigError(
            f"evaluation.max_new_tokens {answer}{before} leaves no room for a prompt in the"
            f" {positions} positions of '{source.name}'"
        )


def _virtual_tokens(adapter: AdapterSettings) -> int:
    """How many positions an adapter takes from the text."""
    settings = METHODS.load(adapter.method).Settings(**adapter.settings)
    return int(getattr(settings, "num_virtual_tokens", None) or 0)


def _note_intervals(config: RunConfig, schedule: Schedule) -> list[str]:
    """Say which intervals are longer than the run, and what comes of it."""
    training, steps = config.training, config.training.max_steps
    notes = []
    if training.warmup_steps >= steps and any(phase.learning_rate is None for phase in schedule.phases):
        highest = max(schedule.learning_rate_at(step) for step in range(steps))
        notes.append(
            f"training.warmup_steps {training.warmup_steps} (--warmup_steps) are not over when the run ends after"
            f" {steps} steps: the learning rate rises to {highest:.3g} and never reaches {training.learning_rate:g}"
        )
    for name, settings in config.probes.items():
        if (settings.get("frequency") or 1) > steps:
            notes.append(
                f"probes.{name}.frequency {settings['frequency']} is more than the run's {steps} steps: it measures nothing"
            )
    beyond = {
        "validation_steps": "the validation loss is computed once, at the end",
        "save_steps": "there is one checkpoint, at the end, and a killed run starts over",
        "log_steps": "no training loss is logged",
    }
    for name, outcome in beyond.items():
        if (getattr(training, name) or 1) > steps:
            notes.append(
                f"training.{name} {getattr(training, name)} is more than the run's {steps} steps: {outcome}"
            )
    return notes


def _lost(counts: Mapping[str, RowCount]) -> list[str]:
    """Say which splits hold answers that the tokenizer cannot write, so that no model with it is ever right there."""
    notes = []
    for split, count in counts.items():
        if count.unwritable_example is not None:
            wanted, read = (
                text if len(text) <= 60 else f"{text[:60]}..." for text in count.unwritable_example
            )
            notes.append(
                f"{split}: {count.unwritable:,} of {count.kept:,} answers cannot be written with this model's tokenizer,"
                f" such as {wanted!r}, which reads back as {read!r}: no answer of the model can equal them"
            )
    return notes


def _load_task(name: str) -> ModuleType:
    """A task's module, after a look at what a task must have."""
    task = TASKS.load(name)
    lacking = [part for part in ("PROMPT", "METRICS", "load") if not hasattr(task, part)]
    if lacking:
        raise ConfigError(f"the task module '{name}' lacks {', '.join(lacking)}; see peftlab.task")
    return task


def _check_rows(counts: Mapping[str, RowCount]) -> None:
    """Refuse a split of which no row is left."""
    for name, count in counts.items():
        if not count.kept:
            why = "; ".join(f"{reason}: {n}" for reason, n in count.dropped.items()) or "the split is empty"
            raise DataError(
                f"no {name} row is left to train on ({why}); raise task.max_length or check the data"
            )


def _order(config: RunConfig, num_rows: int) -> EpochOrder:
    """The order of a run's rows."""
    training = config.training
    rows_per_step = training.batch_size * training.accumulation_steps * num_processes()
    return EpochOrder(
        num_rows, rows_per_step=rows_per_step, batch_size=training.batch_size, seed=training.seed
    )


def _describe_steps(config: RunConfig, num_rows: int) -> dict[str, float]:
    """Steps, epochs and rows of a step."""
    order, steps = _order(config, num_rows), config.training.max_steps
    return {
        "total": steps,
        "per_epoch": order.steps_per_epoch,
        "epochs": steps / order.steps_per_epoch,
        "rows_per_step": order.rows_per_step,
    }


def _structure(
    config: RunConfig, source: ModelSource, schedule: Schedule, rows: tuple[Sequence[Row], Sequence[Row]]
) -> dict[str, Any]:
    """Counts and phases, from the model on the meta device with the adapter attached."""
    dtype = choose_dtype(config.model.weights_dtype, choose_device(config.model.device))
    base = meta_model(source, dtype=dtype)
    width = getattr(source.config.get_text_config(), "hidden_size", None) or 0
    if config.model.gradient_checkpointing:
        switch_checkpointing(base, True)
    total, kind = sum(p.numel() for p in base.parameters()), type(base).__name__
    attached = attach_adapters(
        base, map_model(base), config.adapters, head=source.head, seed=config.training.seed
    )
    parameters = attached.parameters()
    attached.begin(schedule)
    switch = PhaseSwitch(schedule, attached.family, parameters)
    phases: list[dict[str, Any]] = []
    notes = [*attached.selection.notes, *note_ranks(attached)]
    for phase in schedule.phases:
        active = switch.active(phase)
        needed = max(attached.steps_to_train(name) for name in active)
        moving = sum(schedule.learning_rate_at(step) > 0 for step in range(phase.start_step, phase.end_step))
        if moving < needed:
            notes.append(
                f"phase '{phase.name}' has {moving} steps of non-zero learning rate; to show that all its tensors train"
                f" takes {needed}"
            )
        notes += foretell_trunk(
            attached.family,
            list(active),
            phase,
            _order(config, len(rows[0])),
            rows,
            bytes_per_token=width * dtype.itemsize,
            gigabytes=config.training.trunk_cache_gigabytes if num_processes() == 1 else 0,
        )
        phases.append(
            {
                "name": phase.name,
                "start_step": phase.start_step,
                "end_step": phase.end_step,
                "groups": switch.active_groups(phase),
                "layers": list(phase.layers) if phase.layers else phase.half,
                "trainable_tensors": len(active),
                "trainable_parameters": sum(p.numel() for p in active.values()),
            }
        )
    return {
        "total": total,
        "trainable": sum(p.numel() for p in parameters.values()),
        "tensors": len(parameters),
        "phases": phases,
        "class": kind,
        "adapters": describe_adapters(attached, config.adapters),
        "notes": notes,
    }


def _describe(count: RowCount) -> dict[str, Any]:
    """A split's row count as JSON-ready values."""
    return {
        "read": count.read,
        "kept": count.kept,
        "truncated": count.truncated,
        "dropped": dict(count.dropped),
    }


def _check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed."""
    from transformers.integrations import get_available_reporting_integrations

    for name in trackers:
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"training.trackers: '{name}' is not installed; pip install {name}, or leave it out"
            )


def _check_space(directory: Path, trainable: int, keep: int) -> None:
    """Refuse a disk that cannot hold the run's checkpoints."""
    needed = trainable * _BYTES_PER_TRAINED_PARAMETER * (keep + 3) + _BYTES_BESIDE
    place = directory.expanduser().resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"the disk of {directory} has {free >> 20} MiB free, the run needs about {needed >> 20} MiB for"
            f" {keep + 1} checkpoints and the final model; free some, or choose another output.directory"
        )
