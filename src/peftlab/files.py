"""Writing to disk so that a crash leaves the old file or the new one, never half of one.

A file is written beside its place, flushed to the disk and renamed. A folder is filled beside its place, checked and
renamed. Checksums are SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftlab.errors import CheckpointError, ConfigError, OutputError

CHECKSUMS = "checksums.json"
_CHUNK_BYTES = 1 << 20


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically.

    Args:
        path: Where.
        text: What, written as UTF-8.

    Returns:
        The path.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file atomically.

    Args:
        path: Where.
        value: JSON-ready values; NaN and infinities are refused.

    Returns:
        The path.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
        ValueError: The value holds NaN or an infinity.
    """
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside, then move it into place with the checksums of its files.

    Args:
        path: Where the folder shall be; an older one there is replaced in the same move.

    Yields:
        The folder to fill.

    Raises:
        OutputError: The disk is full or the parent cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        write_json(aside / CHECKSUMS, checksums(aside))
        for file in [*aside.rglob("*"), aside]:
            sync_path(file)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        sync_path(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write the folder {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path; the checksum file itself is left out.

    Args:
        folder: The folder.

    Returns:
        Relative path in POSIX form to hexadecimal digest, sorted.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def verify_folder(folder: Path) -> None:
    """Check a folder that `new_folder` made.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: The checksum file is missing, or a file is missing, extra or changed; names them.
    """
    record = folder / CHECKSUMS
    try:
        expected: dict[str, str] = dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not complete: {record.name} cannot be read ({error})") from error
    found = checksums(folder)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(wrong)} not as written; use an older one or make it anew"
        )


def sha256(path: Path) -> str:
    """SHA-256 of one file, read in pieces.

    Args:
        path: The file.

    Returns:
        The hexadecimal digest.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sync_path(path: Path) -> None:
    """Flush a file or folder entry to the disk.

    Args:
        path: The file or folder.
    """
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file as plain values.

    Args:
        path: A YAML file.

    Returns:
        Its mapping.

    Raises:
        ConfigError: It is missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"the config file {path}{line} is not YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"the config file {path} must hold keys and values, such as 'training: {{max_steps: 100}}'"
        )
    return values
