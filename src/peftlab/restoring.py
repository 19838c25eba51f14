"""Putting what is on disk onto a live base: all of it, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from peftlab.errors import CheckpointError, PeftlabError
from peftlab.method import Attachment, Head

_FIELDS: Mapping[str, type] = {"method": str, "settings": dict, "head": str, "labels": list, "base": dict}
"""What a manifest must hold for its adapter to be attached, and of what kind."""
_CODE = (".py", ".pyc", ".pyd", ".so")


def parse_manifest(path: Path, file: str, *, version: int) -> dict[str, Any]:
    """Read a manifest that says what is needed to attach its adapter.

    Args:
        path: The bundle.
        file: The manifest's name in it.
        version: The version that this peftlab reads.

    Returns:
        The manifest.

    Raises:
        CheckpointError: It cannot be read, is of another version, lacks fields or has them of another kind, or names a
            method of one's own that may lie in the bundle itself.
    """
    try:
        manifest = json.loads((path / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / file} cannot be read ({type(error).__name__})") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path / file} does not hold keys and values")
    if manifest.get("version") != version:
        raise CheckpointError(
            f"{path}: manifest version {manifest.get('version')}, this peftlab reads {version}"
        )
    _check_fields(manifest, path)
    return manifest


def _check_fields(manifest: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest that lacks fields, or whose method may lie in the bundle."""
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if not wrong and manifest["head"] not in get_args(Head):
        wrong = [f"head '{manifest['head']}'"]
    if wrong:
        raise CheckpointError(f"{path}: the manifest has no usable {', '.join(wrong)}; it is not of peftlab")
    beside = manifest.get("beside", [])
    if not isinstance(beside, list) or not all(isinstance(adapter, dict) for adapter in beside):
        raise CheckpointError(f"{path}: the manifest's adapters of further towers are no list of settings")
    own = [name for name in (manifest["method"], *(str(a.get("method")) for a in beside)) if "." in name]
    if own:
        code = sorted(file.name for file in path.rglob("*") if file.suffix in _CODE)
        if code:  # where the folder can be imported from, naming a method would run it
            raise CheckpointError(
                f"{path} names the method '{own[0]}' and holds code ({', '.join(code)}); a bundle holds none:"
                " install the method and take the code out of the folder"
            )


@contextmanager
def all_or_nothing(attachment: Attachment, folder: Path) -> Iterator[None]:
    """A context in which a fresh attachment is loaded; where that fails, it is taken off again.

    Args:
        attachment: Just attached.
        folder: Where its content lies, for the message.

    Yields:
        Nothing.

    Raises:
        CheckpointError: The content is damaged or does not fit; the base is as it was before attaching.
    """
    try:
        yield
    except BaseException as error:
        attachment.remove()
        if isinstance(error, PeftlabError) or not isinstance(error, Exception):
            raise
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded, and nothing was: {line}") from error


def load_whole(attachment: Attachment, folder: Path) -> None:
    """Load what was saved into a fresh attachment; where that fails, take the attachment off again.

    Args:
        attachment: Just attached.
        folder: What its method saved.

    Raises:
        CheckpointError: The content is damaged or does not fit; the base is as it was before attaching.
    """
    with all_or_nothing(attachment, folder):
        attachment.load_saved(folder)
