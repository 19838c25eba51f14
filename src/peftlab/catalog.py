"""The folder is the registry: a leaf's file name is its name everywhere.

`Catalog("task", "tasks")` lists the files of `peftlab/tasks/`, reads their first docstring line without importing them,
and imports one when it is asked for. A dotted name (`mylab.tasks.poems`) loads a user's own leaf from outside the package.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from peftlab.errors import InputError, UnknownNameError

_PACKAGE = Path(__file__).parent


class Catalog:
    """The leaves of one folder.

    Args:
        kind: What a leaf is called in messages, e.g. "task".
        folder: The folder below `peftlab` that holds the leaves.

    Example:
        >>> "e2e_nlg" in Catalog("task", "tasks").names()
        True
    """

    def __init__(self, kind: str, folder: str) -> None:
        self.kind, self.folder = kind, folder

    def names(self) -> list[str]:
        """The names of all leaves, sorted."""
        return sorted(p.stem for p in (_PACKAGE / self.folder).glob("*.py") if not p.stem.startswith("_"))

    def describe(self, name: str) -> str:
        """The first line of a leaf's docstring, read without importing it.

        Args:
            name: A name from `names`.

        Returns:
            The line, or "" where the leaf has no docstring.
        """
        doc = ast.get_docstring(
            ast.parse((_PACKAGE / self.folder / f"{name}.py").read_text(encoding="utf-8"))
        )
        return doc.splitlines()[0] if doc else ""

    def defines(self, name: str, part: str) -> bool:
        """Whether a leaf has a part; one of peftlab's own is read without importing it.

        Args:
            name: A leaf's name, or the dotted name of a user's module.
            part: The name of a class or of a variable.

        Returns:
            True where it has.
        """
        canonical = self.check(name)
        if "." in canonical:
            return hasattr(self.load(canonical), part)
        text = (_PACKAGE / self.folder / f"{canonical}.py").read_text(encoding="utf-8")
        return any(
            (isinstance(node, ast.ClassDef) and node.name == part)
            or (isinstance(node, ast.Assign) and any(getattr(t, "id", None) == part for t in node.targets))
            for node in ast.parse(text).body
        )

    def check(self, name: str) -> str:
        """The canonical form of a name.

        Args:
            name: A leaf's name, or the dotted name of a user's module.

        Returns:
            The name, dashes turned into underscores.

        Raises:
            UnknownNameError: No such leaf, or no such module.
        """
        canonical = name if "." in name else name.replace("-", "_")
        if "." in canonical:
            if os.getcwd() not in sys.path:  # a user's own module lies where the command was given
                sys.path.insert(0, os.getcwd())
            try:
                found = importlib.util.find_spec(canonical)
            except ModuleNotFoundError:
                found = None
            if found is None:
                raise UnknownNameError(self.kind, name, self.names())
        elif canonical not in self.names():
            raise UnknownNameError(self.kind, name, self.names())
        return canonical

    def load(self, name: str) -> ModuleType:
        """Import a leaf.

        Args:
            name: A leaf's name, or the dotted name of a user's module.

        Returns:
            The module.

        Raises:
            UnknownNameError: No such leaf.
            InputError: The user's own module fails while it is imported.
        """
        canonical = self.check(name)
        if "." not in canonical:
            return importlib.import_module(f"peftlab.{self.folder}.{canonical}")
        try:
            return importlib.import_module(canonical)
        except ImportError as error:
            raise InputError(f"the {self.kind} module '{name}' cannot be imported: {error}") from error


TASKS = Catalog("task", "tasks")
METHODS = Catalog("method", "methods")
METRICS = Catalog("metric", "metrics")
PROBES = Catalog("probe", "probes")
FAMILIES = Catalog("family", "families")
EXPERIMENTS = Catalog("experiment", "experiments")
CATALOGS = {
    "tasks": TASKS,
    "methods": METHODS,
    "metrics": METRICS,
    "probes": PROBES,
    "experiments": EXPERIMENTS,
}
