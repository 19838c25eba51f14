"""What must be true on this machine before anything heavy starts: the places that a config names.

All problems are reported at once. Cheap: no file is read, nothing stays behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peftlab.errors import DataError, InputError, ModelError, OutputError

if TYPE_CHECKING:
    from peftlab.config import RunConfig


def check_places(config: RunConfig) -> None:
    """Check model folder, data folder and output folder of a config.

    Args:
        config: The config.

    Raises:
        ModelError: The model is written as a path, and there is no model folder.
        DataError: The data folder is missing.
        OutputError: The output folder cannot be made or written.
        InputError: Several of these; each on its own line.
    """
    problems: list[InputError] = []
    checks: tuple[Callable[[], None], ...] = (
        partial(check_model_folder, config.model.name),
        partial(check_data_folder, config.task.data_dir),
        partial(check_writable, config.output.directory),
    )
    for check in checks:
        try:
            check()
        except InputError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError("\n".join(str(problem) for problem in problems))


def check_model_folder(name: str) -> None:
    """Check a model that is a local folder; a hub name is left to the loading.

    Args:
        name: `model.name`.

    Raises:
        ModelError: It is a folder without `config.json`, or can only be a path and is not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any(
            (path / file).is_file() for file in ("config.json", "manifest.json", "adapter_config.json")
        ):
            raise ModelError(
                f"the model folder {name} holds no config.json, so it is not a transformers model"
            )
        return
    if path.is_file():
        raise ModelError(f"model '{name}' is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/"):
        raise ModelError(
            f"there is no model folder {name} (--model takes a folder or a hub name such as org/model)"
        )


def check_data_folder(data_dir: Path | None) -> None:
    """Check the folder of a task's data.

    Args:
        data_dir: `task.data_dir`.

    Raises:
        DataError: It is given and is not a folder.
    """
    if data_dir is None:
        return
    path = data_dir.expanduser()
    if not path.exists():
        raise DataError(f"there is no data folder {data_dir} (--data-dir, task.data_dir)")
    if not path.is_dir():
        raise DataError(f"the data folder {data_dir} is a file; give the folder that holds it (--data-dir)")


def check_writable(directory: Path) -> None:
    """Check that a folder can be made and written, by writing an unnamed file where it would begin.

    Args:
        directory: The folder; it need not exist yet.

    Raises:
        OutputError: It cannot; says why.
    """
    path = directory.expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    said = f"the output folder {directory} cannot be written (--output_dir, output.directory)"
    if not existing.is_dir():
        raise OutputError(f"{said}: {existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(f"{said}: {existing}: {error.strerror or error}") from None
