"""Names of folders that a person or a file chooses: safe ones alone, and what happens to one that is there already."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from peftlab.errors import InputError, OutputError

OnConflict = Literal["refuse", "version", "overwrite"]
"""What happens to a name that is there: an error, the next free `NAME-2`, or the old folder goes in the same move."""

_LONGEST = 100
_ALLOWED = re.compile(r"\w[\w.+-]*", re.ASCII)
_RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{n}" for device in ("com", "lpt") for n in range(10))}
"""Names that Windows keeps for devices, whatever ending they have."""
_MOST_VERSIONS = 10_000


def check_name(name: str) -> str:
    """Refuse a name that is not one plain folder on every system.

    Args:
        name: The name as given.

    Returns:
        The same name.

    Raises:
        InputError: It is empty, too long, starts or ends with a dot, is a device's, or holds other characters than letters
            and digits of ASCII, "_", "-", "+" and ".".

    Example:
        >>> check_name("mnli-r8.v2")
        'mnli-r8.v2'
    """
    wrong = ""
    if not name.strip():
        wrong = "is empty"
    elif len(name) > _LONGEST:
        wrong = f"has {len(name)} characters, and {_LONGEST} is the most"
    elif not _ALLOWED.fullmatch(name) or name.endswith("."):
        wrong = "is not letters, digits, '_', '-', '+' and '.' alone, with a letter, digit or '_' first and no '.' last"
    elif name.partition(".")[0].lower() in _RESERVED:
        wrong = "is a device's name on Windows"
    if wrong:
        raise InputError(f"the name {name[:_LONGEST]!r} {wrong}; give another, such as mnli-r8")
    return name


def choose_folder(parent: Path, name: str, on_conflict: OnConflict = "refuse") -> Path:
    """The folder that a name stands for, with what shall happen to one that is there.

    Nothing is made or deleted: who writes through `files.new_folder` puts the new one in the old one's place in one move.

    Args:
        parent: The folder in which it shall lie.
        name: Its name.
        on_conflict: What happens where something of this name is there.

    Returns:
        The folder's path; with "version" the first of NAME, NAME-2, NAME-3 ... that is free.

    Raises:
        InputError: The name is not safe, or `on_conflict` is none of the three.
        OutputError: The name is there and shall not be replaced, or is no folder.
    """
    if on_conflict not in get_args(OnConflict):
        raise InputError(f"on_conflict is '{on_conflict}'; it is one of {', '.join(get_args(OnConflict))}")
    path = parent / check_name(name)
    if not _is_there(path):
        return path
    if on_conflict == "refuse":
        raise OutputError(
            f"{path} is there already: choose another name, or on_conflict=version (a new one beside it) or"
            " on_conflict=overwrite"
        )
    if on_conflict == "overwrite":
        if path.is_symlink() or not path.is_dir():
            raise OutputError(f"{path} is not a folder, so it is not overwritten: choose another name")
        return path
    for number in range(2, _MOST_VERSIONS):
        version = parent / check_name(f"{name}-{number}")
        if not _is_there(version):
            return version
    raise OutputError(f"{parent} holds {_MOST_VERSIONS} versions of {name}: choose another name")


def _is_there(path: Path) -> bool:
    """Whether something has this name, a link that leads nowhere too."""
    return path.exists() or path.is_symlink()
