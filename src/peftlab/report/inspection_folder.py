"""What `peftlab inspect` left in a folder, read back without torch."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from peftlab.errors import DataError, RunError

INSPECTION = "inspection.json"
"""What was seen in one model."""
COMPARISON = "comparison.json"
"""How two models compare; each is in a folder of its own beside it."""
PAGE = "inspection.html"


def is_inspection(folder: str | Path) -> bool:
    """Whether a folder is one that `peftlab inspect` made.

    Args:
        folder: Any path.
    """
    return any((Path(folder) / name).is_file() for name in (INSPECTION, COMPARISON))


class InspectionFolder:
    """The folder of one inspected model.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @cached_property
    def document(self) -> dict[str, Any]:
        """Everything but the arrays.

        Raises:
            DataError: The folder holds no inspection.
            RunError: The file is damaged.
        """
        return read_document(self.path / INSPECTION)

    @property
    def plots(self) -> Path:
        """Where charts lie."""
        return self.path / "plots"

    def array(self, name: str) -> Any:
        """One of the arrays.

        Args:
            name: Its name in the document.

        Returns:
            A numpy array.

        Raises:
            RunError: It is missing or damaged.
        """
        import numpy as np

        path = self.path / "arrays" / f"{name}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error


def read_document(path: Path) -> dict[str, Any]:
    """A JSON file of an inspection.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DataError: It is not there.
        RunError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} holds no {path.name}; `peftlab inspect MODEL` makes one") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: a mapping is expected, not {type(content).__name__}")
    return content
