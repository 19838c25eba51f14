"""An adapter in peft's own form, put on the base that it names, with a task's data: ready to be scored."""

from __future__ import annotations

from pathlib import Path

from peftlab.catalog import TASKS
from peftlab.config import RunConfig
from peftlab.errors import InputError, ModelError
from peftlab.importing.adapter import find_base, put_on, read_foreign
from peftlab.loading import load_model
from peftlab.store import Opened
from peftlab.task_data import load_splits


def open_foreign(config: RunConfig, path: Path) -> Opened:
    """Load the task, the base and, onto it, an adapter that peft saved.

    Args:
        config: The base, the task and settings.
        path: The adapter's folder.

    Returns:
        What was opened; its prompt is the task's, for the folder does not say which one it was trained with.

    Raises:
        InputError: There are no such data, or adapter and task do not have the same classes.
        ModelError: There is no such base.
        ConfigError: The adapter's config says what no method here can express.
        CheckpointError: Its tensors are damaged, or do not fit the base.
    """
    task = TASKS.load(config.task.name)
    seed = config.training.seed
    splits = load_splits(config.task, seed=config.data_seed)
    foreign = read_foreign(path)
    try:
        source = find_base(foreign, config.model, ())
    except ModelError as error:
        raise ModelError(
            f"{error} (the base that {path} names; put the adapter on another one with: peftlab import {path} --base"
            " MODEL --output DIR)"
        ) from None
    splits = splits.for_head(source.head)
    found = int(source.config.num_labels) if source.head == "classification" else 0
    if found != len(splits.labels):
        raise InputError(
            f"{path} is an adapter of a {source.head} model with {found or 'no'} classes, and the task"
            f" '{config.task.name}' has {len(splits.labels) or 'no'} classes for such a model"
        )
    model = load_model(source, config.model, seed=seed)
    _, attachment = put_on(foreign, model, source)
    attachment.model.eval()
    labels = splits.labels
    return Opened(config, task, splits, attachment.model, source.tokenizer, source.head, labels, attachment)
