"""The examples of a task, wherever its data lie: a folder, an archive, or the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from peftlab.catalog import TASKS
from peftlab.config import TaskSettings
from peftlab.downloads import fetch, unpack
from peftlab.errors import DataError
from peftlab.hub_data import save_hub_data
from peftlab.task import Splits


def load_splits(settings: TaskSettings, *, seed: int) -> Splits:
    """The splits that a config asks for.

    Args:
        settings: The task, its own settings and where its data lie.
        seed: The run's seed.

    Returns:
        The splits, with a note on where downloaded data came from.

    Raises:
        DataError: There are no such data, or they are malformed.
    """
    task = TASKS.load(settings.name)
    data_dir, notes = _folder(settings, task)
    own: dict[str, Any] = {}
    if hasattr(task, "Settings"):
        own["settings"] = task.Settings.model_validate(settings.settings)
    splits: Splits = task.load(data_dir, seed=seed, **own)
    return dataclasses.replace(splits, notes=(*notes, *splits.notes)) if notes else splits


def _folder(settings: TaskSettings, task: ModuleType) -> tuple[Path | None, tuple[str, ...]]:
    """The folder that the task reads, and what is to be said of it."""
    if settings.archive is not None:
        file = fetch(settings.archive, sha256=settings.archive_sha256)
        pinned = "as asked" if settings.archive_sha256 else "pin it with task.archive_sha256"
        return unpack(file.path), (f"archive {settings.archive}, sha256 {file.sha256} ({pinned})",)
    if settings.hub is None:
        return settings.data_dir, ()
    names = getattr(task, "HUB_FILES", None)
    if names is None:
        raise DataError(
            f"the task '{settings.name}' cannot be read from the hub; download the data set's own files and give their"
            " folder with --data-dir"
        )
    columns = getattr(task, "HUB_COLUMNS", {})
    convert = getattr(task, "from_hub", None)
    folder = save_hub_data(settings.hub, names=names, columns=columns, convert=convert)
    return folder, (f"data set {settings.hub} of the hub, kept in {folder}",)
