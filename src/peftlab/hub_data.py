"""Data sets by their name on the hub, written as the files that a task reads.

`datasets` does the fetching and has its own cache; what a task reads is written once beside it, with the task's own file
names, so that there is one way to read a data set. No code of a data set is run (law 8).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peftlab.downloads import cache_folder
from peftlab.errors import CheckpointError, DataError, OutputError
from peftlab.files import new_folder, verify_folder, write_text

INSTALL = 'pip install "peftlab[hub]"'
Rows = Iterable[Mapping[str, Any]]
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
"""Split to the names it has on the hub, the usual one first."""


def save_hub_data(
    name: str,
    *,
    names: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
    convert: Callable[[str, Rows], Mapping[str, Rows]] | None = None,
) -> Path:
    """A data set of the hub as files.

    Args:
        name: "org/name", or "org/name:subset" where it has several; a local folder of data files works too.
        names: File name of each split, e.g. {"train": "train.jsonl", ...}; ends in .jsonl, .json or .csv.
        columns: Names on the hub to names in the files; other columns keep theirs.
        convert: From the file's name and the split's rows to the rows of every file that is made of them; None is that
            one file with the rows as they are.

    Returns:
        The folder, one for each form in which a task reads; made once, and made anew where a file in it has changed.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be had, has no train split, or other columns than the
            task's.
        OutputError: The cache cannot be written.
    """
    form = json.dumps([dict(names), dict(columns or {}), getattr(convert, "__module__", "")], sort_keys=True)
    plain = name.replace("/", "--").replace(":", "--")
    folder = cache_folder() / "hub" / f"{plain}-{hashlib.sha256(form.encode()).hexdigest()[:8]}"
    is_local = Path(name.partition(":")[0]).exists()  # what lies here may have changed since
    if not is_local and _is_whole(folder, names):
        return folder
    found = _load(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the cache {folder.parent} cannot be made: {error.strerror or error}") from None
    with new_folder(folder) as aside:
        for split, file in names.items():
            part = next(
                (found[spelling] for spelling in _SPLITS.get(split, (split,)) if spelling in found), None
            )
            if part is not None:
                for place, rows in _converted(convert, file, part, name).items():
                    write_text(aside / place, _text(rows, place, columns or {}))
            elif split == "train":
                raise DataError(
                    f"the data set {name} has no train split; it has {', '.join(found) or 'none'}"
                )
    return folder


def _is_whole(folder: Path, names: Mapping[str, str]) -> bool:
    """Whether the files are there as they were written."""
    try:
        verify_folder(folder)
    except CheckpointError:
        return False
    return (folder / names["train"]).is_file()


def _load(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The data set's splits."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} is read with the package 'datasets', which is not installed: {INSTALL}; or download the files and"
            " give their folder with --data-dir"
        ) from None
    path, _, subset = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, subset or None)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # what datasets and its client raise: one line for a person
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set {name} cannot be had: {first}; check the name (org/name:subset) and the network, or download"
            " the files elsewhere and give their folder with --data-dir"
        ) from error
    splits: Mapping[str, Iterable[Mapping[str, Any]]] = loaded
    return splits


def _converted(
    convert: Callable[[str, Rows], Mapping[str, Rows]] | None, file: str, rows: Rows, name: str
) -> Mapping[str, Rows]:
    """The files that are made of one split."""
    if convert is None:
        return {file: rows}
    try:
        return convert(file, rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the data set {name} has other columns than this task reads ({file}: {error}); take the one that the task's"
            " documentation names, or give your own files with --data-dir"
        ) from None


def _text(rows: Iterable[Mapping[str, Any]], file: str, columns: Mapping[str, str]) -> str:
    """The rows of one split in the form that the file's name asks for."""
    named = [{columns.get(key, key): value for key, value in row.items()} for row in rows]
    if file.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in named)
    if file.endswith(".csv"):
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(named[0]) if named else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(named)
        return stream.getvalue()
    return json.dumps(named, ensure_ascii=False)
