"""What a trainer is made of, and transformers' training arguments for a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlab.batches import Collator, Row
from peftlab.config import RunConfig
from peftlab.devices import choose_device, num_processes
from peftlab.grouping import Grouping
from peftlab.isolation import Isolation
from peftlab.method import Attachment
from peftlab.objective import Objective
from peftlab.probe import RunningProbe
from peftlab.schedule import Schedule

_TENTHS = 10

Event = Callable[..., None]
"""Receives what happens: `event(kind, **fields)`."""


def ignore_event(kind: str, **fields: Any) -> None:
    """An event receiver that keeps nothing."""


@dataclass(frozen=True, slots=True)
class TrainingParts:
    """What a `LabTrainer` is made of.

    Attributes:
        attachment: The adapter on its base.
        schedule: What trains when, and how fast.
        objective: What is minimised.
        collator: Makes padded batches of rows.
        train_rows: Rows to train on.
        validation_rows: Rows whose loss chooses the best checkpoint.
        probes: Running probes by name.
        event: Receives what happens.
        keep_checkpoints: How many checkpoints stay besides the best.
        seed: Root of the random streams.
        isolation: Keeps the rows of packed batches apart; None pads them.
        grouping: Divides padded batches into groups of like length; None leaves them whole.
        trunk_bytes: Most bytes that hidden states of frozen blocks may take on disk; 0 keeps none.
    """

    attachment: Attachment
    schedule: Schedule
    objective: Objective
    collator: Collator
    train_rows: Sequence[Row]
    validation_rows: Sequence[Row]
    probes: dict[str, RunningProbe] = field(default_factory=dict)
    event: Event = ignore_event
    keep_checkpoints: int = 2
    seed: int = 42
    isolation: Isolation | None = None
    grouping: Grouping | None = None
    trunk_bytes: int = 0


def make_arguments(config: RunConfig, checkpoints: Path, schedule: Schedule) -> Any:
    """The arguments of `LabTrainer`.

    Args:
        config: What is asked for.
        checkpoints: Where checkpoints go.
        schedule: The run's schedule.

    Returns:
        transformers' `TrainingArguments`.
    """
    from transformers import TrainingArguments

    training = config.training
    device = choose_device(config.model.device)
    every = training.validation_steps or max(1, training.max_steps // _TENTHS)
    if training.trackers:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints.parent / "tensorboard")
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_norm,
        logging_strategy="steps",
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=training.save_steps or every,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=training.seed,
        report_to=list(training.trackers) or "none",
        run_name=checkpoints.parent.name,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        fp16=False,
        bf16=False,
        ddp_backend="gloo" if num_processes() > 1 and device.type == "cpu" else None,
        ddp_find_unused_parameters=num_processes() > 1,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
