"""Where the models of tasks lie on disk: `DIRECTORY/TASK/KIND`, later versions `KIND-2`, `KIND-3` ..., a bundle each.

What lies there is the list: there is no index beside it that could be out of date, so any process finds it.
"""

from __future__ import annotations

import re
from pathlib import Path

from peftlab.errors import InputError, OutputError, UnknownNameError
from peftlab.folders import OnConflict, check_name, choose_folder
from peftlab.store import MANIFEST


class TaskFolders:
    """The folders of one kind of model.

    Args:
        directory: The folder in which each task has a folder.
        kind: lora, new_layer or hybrid.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind

    def tasks(self) -> list[str]:
        """The tasks with a saved model of this kind, sorted."""
        if not self.directory.is_dir():
            return []
        folders = (path for path in self.directory.iterdir() if path.is_dir() and not path.is_symlink())
        return sorted(path.name for path in folders if self._versions_in(path))

    def versions(self, task: str) -> list[int]:
        """The versions of a task's model, the newest last.

        Args:
            task: The task's name.

        Returns:
            Numbers from 1.

        Raises:
            InputError: The name cannot be a folder's.
            OutputError: The folder is a link, or a file.
        """
        return self._versions_in(self._folder(task))

    def find(self, task: str, version: int | None = None) -> Path:
        """The folder of a saved model.

        Args:
            task: The task's name.
            version: Which one; None is the newest.

        Returns:
            The folder.

        Raises:
            InputError: The name is none, nothing was saved under it, or there is no such version.
            UnknownNameError: Other tasks were saved, not this one.
        """
        versions = self.versions(task)
        if not versions:
            what = f"saved {self.kind} model below {self.directory}"
            if known := self.tasks():
                raise UnknownNameError(what, task, known)
            raise InputError(f"there is no {what}: nothing was saved there yet (asked for: '{task}')")
        if version is not None and version not in versions:
            raise InputError(
                f"there is no version {version} of the {self.kind} model '{task}' below {self.directory}; there is:"
                f" {', '.join(map(str, versions))}"
            )
        return self._folder(task) / self._name(version or versions[-1])

    def place(self, task: str, on_conflict: OnConflict) -> Path:
        """The folder into which a model is to be saved.

        Args:
            task: The task's name.
            on_conflict: What to do where the task has a model: "overwrite" means the newest.

        Returns:
            The folder; one that is there is to be replaced.

        Raises:
            InputError: The name cannot be a folder's, or `on_conflict` is not known.
            OutputError: The task has a model, and nothing was said of that.
        """
        versions = self.versions(task)
        newest = self._name(versions[-1]) if versions and on_conflict == "overwrite" else self.kind
        return choose_folder(self._folder(task), newest, on_conflict)

    def _name(self, version: int) -> str:
        return self.kind if version == 1 else f"{self.kind}-{version}"

    def _versions_in(self, folder: Path) -> list[int]:
        """The versions in a task's folder."""
        if not folder.is_dir():
            return []
        pattern = re.compile(rf"{self.kind}(?:-([2-9]|[1-9]\d+))?")
        names = [path.name for path in folder.iterdir() if (path / MANIFEST).is_file()]
        return sorted(int(found.group(1) or 1) for name in names if (found := pattern.fullmatch(name)))

    def _folder(self, task: str) -> Path:
        """A task's folder, certainly below the directory."""
        folder = self.directory / check_name(task)
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(
                f"{folder} is {'a link' if folder.is_symlink() else 'a file'}, not a task's folder"
            )
        return folder
