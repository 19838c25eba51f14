"""Config keys that there are not: what a message says of each, and where such a key would belong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftlab.catalog import METHODS
from peftlab.commands.flags import FLAGS
from peftlab.commands.overlay import DEFAULT_METHOD
from peftlab.commands.schema import config_keys
from peftlab.errors import UnknownNameError

_OTHER_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "dropout_probability": "dropout",
    "target": "targets",
    "target_modules": "targets",
    "init_r": "initial_rank",
    "target_r": "target_rank",
    "prefix_length": "num_virtual_tokens",
}
"""What peft and the seed systems call a method's settings."""
_CLOSE = 0.7


def drop_unknown(
    values: dict[str, Any], *, method: str, where: str = "", said: Mapping[str, str] | None = None
) -> list[str]:
    """Take unknown keys out of a source and say what they were.

    Args:
        values: The source, changed in place.
        method: The method whose settings may stand below `method`.
        where: Start of each message, e.g. "run.yaml: ".
        said: Dotted key to the flag that set it, e.g. "--r".

    Returns:
        One message for each unknown key, with a suggestion by its full path.
    """
    try:
        known = [key.path for key in config_keys(method)]
    except UnknownNameError:
        return []  # the config itself says that there is no such method
    sections = {"adapters", "probes", *(path.partition(".")[0] for path in known)}
    problems = []
    for section in list(values):
        inner = values[section]
        if section not in sections:
            hint = _suggest(str(section), known) or _elsewhere(str(section), "")
            problems.append(f"{where}unknown key '{section}'{hint}")
            del values[section]
        elif section == "method" and isinstance(inner, dict):
            problems += drop_method_keys(inner, method=method, place="method", where=where, said=said)
        elif isinstance(inner, dict) and section not in ("adapters", "probes"):
            for key in [k for k in inner if f"{section}.{k}" not in known]:
                path = f"{section}.{key}"
                problems.append(
                    f"{where}unknown key '{path}'{_suggest(path, known) or _siblings(section, known)}"
                )
                del inner[key]
    return problems


def drop_method_keys(
    settings: dict[Any, Any],
    *,
    method: str,
    place: str,
    where: str = "",
    said: Mapping[str, str] | None = None,
) -> list[str]:
    """Take settings out that a method does not have, and say of each what the method has and where it would belong.

    Args:
        settings: The method's settings, "name" among them or not; changed in place.
        method: The method.
        place: The path that they lie below, e.g. "method" or "adapters.1.settings".
        where: Start of each message.
        said: Dotted key to the flag that set it.

    Returns:
        One message for each.

    Raises:
        UnknownNameError: No such method.
    """
    own = method_settings(method)
    problems = []
    for key in [key for key in settings if key not in own and key != "name"]:
        flag = (said or {}).get(f"{place}.{key}")
        told = f"unknown key '{place}.{key}'{f' ({flag})' if flag else ''}"
        problems.append(f"{where}{told}{_explain(str(key), method, own, place)}")
        del settings[key]
    return problems


def method_settings(method: str) -> list[str]:
    """The names of a method's settings.

    Args:
        method: The method.

    Returns:
        Their names, in the method's order.

    Raises:
        UnknownNameError: No such method.
    """
    return list(METHODS.load(method).Settings.model_fields)


def _explain(key: str, method: str, own: Sequence[str], place: str) -> str:
    """What follows "unknown key ...": a suggestion, what the method has, and which methods have such a key."""
    near = _near(key, own)
    elsewhere = "" if near else _elsewhere(key, method)
    meant = [f"{place}.{name}" for name in near]
    if not near and not elsewhere:
        meant = _in_other_sections(key)
    joined = "' or '".join(meant)
    hint = f" (did you mean '{joined}'?)" if meant else ""
    return f"{hint}; method {method} has: {', '.join(own) or 'no settings'}{elsewhere}"


def _near(key: str, own: Sequence[str]) -> list[str]:
    """A method's settings that a person may have meant: by another name, by spelling, or as a part of a longer name."""
    name = _OTHER_NAMES.get(key, key)
    if name in own:
        return [name]
    close = difflib.get_close_matches(name, own, n=1, cutoff=_CLOSE)
    return close or [setting for setting in own if name in setting.split("_")][:2]


def _elsewhere(key: str, method: str) -> str:
    """Which other methods have a setting of this name, or one that is spelt alike."""
    owners: dict[str, list[str]] = {}
    for other in METHODS.names():
        if other != method:
            for name in method_settings(other):
                owners.setdefault(name, []).append(other)
    wanted = _OTHER_NAMES.get(key, key)
    found = next(iter(difflib.get_close_matches(wanted, owners, n=1, cutoff=_CLOSE)), None)
    if found is None:
        return ""
    return f"; '{found}' is a setting of {_methods(owners[found])}"


def _methods(names: Sequence[str]) -> str:
    """Methods in words, with the way to choose one."""
    return f"method {names[0]}" if len(names) == 1 else f"the methods {', '.join(names)} (--method NAME)"


def _in_other_sections(key: str) -> list[str]:
    """The key of another section that has this name, or that a flag of this name sets."""
    known = [path for path in _paths() if not path.startswith("method.")]
    flag = {name: f.key for f in FLAGS for name in (f.name, f.alias) if name}.get(key)
    same = [path for path in known if path.rpartition(".")[2] == key]
    return same[:1] or ([flag] if flag in known else [])


def _paths(method: str = DEFAULT_METHOD) -> list[str]:
    """All dotted keys of the config."""
    return [key.path for key in config_keys(method)]


def _siblings(section: str, known: Iterable[str]) -> str:
    """What there is in a section, for a message."""
    return "; there is: " + ", ".join(
        path.partition(".")[2] for path in known if path.startswith(f"{section}.")
    )


def _suggest(path: str, known: Sequence[str]) -> str:
    """The known key that a person may have meant, by its full path.

    Args:
        path: What was written.
        known: All dotted keys.

    Returns:
        " (did you mean 'training.max_steps'?)", or "".
    """
    last = path.rpartition(".")[2]
    flag = {name: f.key for f in FLAGS for name in (f.name, f.alias) if name}.get(last)
    same = [key for key in known if key.rpartition(".")[2] == last]
    sections = {key.partition(".")[0] for key in known}
    close = difflib.get_close_matches(path, [*known, *sections], n=1, cutoff=_CLOSE)
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=_CLOSE)]
    found = next(iter([*same, *([flag] if flag in known else []), *close, *near]), None)
    return f" (did you mean '{found}'?)" if found else ""
