"""`peftlab list methods NAME` and its like: what can be set on one method, task or probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftlab.catalog import CATALOGS, METHODS
from peftlab.commands.flags import FLAGS
from peftlab.commands.schema import ConfigKey, settings_keys

_PLACES: Mapping[str, Callable[[str], str]] = {
    "methods": lambda name: "method",
    "tasks": lambda name: "task.settings",
    "probes": lambda name: f"probes.{name}",
}
_CHOSEN: Mapping[str, str] = {
    "methods": "--method {}",
    "tasks": "--task {}",
    "probes": "--set probes.{}={{}}",
}

Row = tuple[str, ...]


def setting_rows(kind: str, name: str) -> list[Row]:
    """Every setting of one leaf as a table.

    Args:
        kind: "methods", "tasks" or "probes".
        name: The leaf, or the dotted name of a module of one's own.

    Returns:
        Header and a row of key, default, flag and text for each; only a header where nothing can be set.

    Raises:
        UnknownNameError: There is no such leaf.
    """
    flags = {flag.key: f"--{flag.name}" for flag in FLAGS if flag.metavar}
    rows: list[Row] = [("KEY", "DEFAULT", "FLAG", "WHAT IT IS FOR [TYPE]")]
    for key in leaf_keys(kind, name):
        rows.append((key.path, key.default, flags.get(key.path, ""), f"{key.text} [{key.kind}]"))
    return rows


def leaf_keys(kind: str, name: str) -> list[ConfigKey]:
    """The config keys of one leaf.

    Args:
        kind: "methods", "tasks" or "probes".
        name: The leaf.

    Returns:
        Its keys; none where it has no settings.

    Raises:
        UnknownNameError: There is no such leaf.
    """
    catalog = CATALOGS[kind]
    canonical = catalog.check(name)
    if not catalog.defines(canonical, "Settings"):
        return []
    return settings_keys(catalog.load(canonical).Settings, _PLACES[kind](canonical))


def heading(kind: str, name: str) -> str:
    """What a leaf is, and how it is chosen.

    Args:
        kind: "methods", "tasks" or "probes".
        name: The leaf.

    Returns:
        Two lines.

    Raises:
        UnknownNameError: There is no such leaf.
    """
    catalog = CATALOGS[kind]
    canonical = catalog.check(name)
    if "." in canonical:
        text = ((catalog.load(canonical).__doc__ or "").strip().splitlines() or [""])[0]
    else:
        text = catalog.describe(canonical)
    return f"{canonical}: {text}\nchosen by {_CHOSEN[kind].format(canonical)}"


def notes(kind: str, name: str) -> str:
    """What stands below the settings of a leaf.

    Args:
        kind: "methods", "tasks" or "probes".
        name: The leaf.

    Returns:
        Lines; "" where there is nothing to add.
    """
    if kind == "methods" and METHODS.check(name) == "peft":
        return "`peftlab list peft_types` shows the types, `peftlab list peft_types TYPE` the fields of method.config."
    if kind == "methods":
        return _example(name)
    return ""


def _example(name: str) -> str:
    """The method with a setting, on the command line and in a config file."""
    keys: list[Any] = [key for key in leaf_keys("methods", name) if key.default not in ("null", "")]
    if not keys:
        return ""
    first = keys[0]
    own = METHODS.check(name)
    setting = first.path.partition(".")[2]
    return (
        f"on the command line: peftlab run --method {own} --set {first.path}={first.default}\n"
        f"in a config file:    method: {{name: {own}, {setting}: {first.default}}}"
    )
