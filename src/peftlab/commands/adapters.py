"""The adapters of a config where there are several: changed by number, and each named in what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.commands.overlay import DEFAULT_METHOD, single_method
from peftlab.commands.unknown_keys import drop_method_keys
from peftlab.config import AdapterSettings
from peftlab.errors import ConfigError, UnknownNameError, did_you_mean
from peftlab.settings import validate

_KEYS = ("scope", "method", "settings")
_EXAMPLE = "adapters: [{scope: encoder, method: lora, settings: {rank: 8}}]"


def change_numbered(lower: Mapping[str, Any], upper: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Lay `adapters.0.settings.rank=4` over the adapters that a lower source has, counted from 0.

    Args:
        lower: The source that has the adapters; without any it has LoRA on the whole model.
        upper: What the command line sets; its numbered adapters are taken out of it.

    Returns:
        The lower source with the changes, and a message for each that cannot be made; then none is.
    """
    given = upper.get("adapters")
    if not isinstance(given, Mapping):
        return dict(lower), []
    del upper["adapters"]
    if "method" in upper:
        return dict(lower), ["give method.KEY (one adapter) or adapters.NUMBER.KEY (several), not both"]
    adapters = _listed(lower)
    problems = []
    for key, change in given.items():
        if not str(key).isdecimal() or int(key) >= len(adapters):
            problems.append(f"'adapters.{key}': {_count(adapters)}; --set adapters.NUMBER.KEY changes one")
        elif not isinstance(change, Mapping):
            problems.append(f"'adapters.{key}' must hold {', '.join(_KEYS)}, not {change!r}")
        else:
            adapters[int(key)] = _changed(adapters[int(key)], change)
            problems += _check_one(adapters[int(key)], int(key), where="")
    if problems:
        return dict(lower), problems
    rest = {name: value for name, value in lower.items() if name not in ("method", "adapters")}
    return single_method(rest | {"adapters": adapters}), []


def check_adapters(values: dict[str, Any], *, where: str = "") -> list[str]:
    """Say what is wrong with a list of adapters, each named by its number, scope and method.

    Args:
        values: A source; a list with something wrong is taken out of it.
        where: Start of each message, e.g. "run.yaml: ".

    Returns:
        The messages.
    """
    if "adapters" not in values:
        return []
    adapters = values["adapters"]
    problems = []
    if not isinstance(adapters, list | tuple):
        problems.append(f"{where}'adapters' must be a list, such as {_EXAMPLE}, not {adapters!r}")
    elif not adapters:
        problems.append(
            f"{where}'adapters' is an empty list: a run has at least one, such as {_EXAMPLE}; leave it out for LoRA on the"
            " whole model"
        )
    else:
        for number, adapter in enumerate(adapters):
            problems += _check_one(adapter, number, where=where)
    if problems:
        del values["adapters"]
    return problems


def check_which(upper: dict[str, Any], lower: Mapping[str, Any], said: Mapping[str, str]) -> list[str]:
    """Refuse settings of "the" method where a lower source has several adapters, or one with a scope of its own.

    Args:
        upper: What the command line sets; such settings are taken out of it.
        lower: The source below.
        said: Dotted key to the flag that set it.

    Returns:
        The message, or nothing.
    """
    adapters, method = lower.get("adapters"), upper.get("method")
    if not isinstance(adapters, list) or not isinstance(method, Mapping) or "adapters" in upper:
        return []
    del upper["method"]
    given = [said.get(f"method.{key}", f"--set method.{key}") for key in method]
    key = next((name for name in method if name != "name"), None)
    example = f"adapters.0.settings.{key}={method[key]}" if key else f"adapters.0.method={method['name']}"
    return [f"{', '.join(given)}: {_count(adapters)}; say which one it is for, such as --set {example}"]


def _changed(adapter: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter with changes; another method has none of the old one's settings."""
    method = adapter.get("method", DEFAULT_METHOD)
    old = adapter.get("settings") or {} if change.get("method", method) == method else {}
    new = change.get("settings", {})
    return {**adapter, **change, "settings": {**old, **new} if isinstance(new, Mapping) else new}


def _check_one(adapter: Any, number: int, *, where: str) -> list[str]:
    """What is wrong with one adapter of a list."""
    if not isinstance(adapter, Mapping):
        return [f"{where}adapter {number} must hold {', '.join(_KEYS)}, not {adapter!r}"]
    own = {**adapter}
    if isinstance(own.get("settings"), Mapping):
        own["settings"] = dict(own["settings"])
    start = f"{where}adapter {_name(own, number)}: "
    problems = _drop_unknown(own, number, start=start)
    try:
        validate(AdapterSettings, own, where=f"adapters.{number}")
    except ConfigError as error:
        lines = str(error).replace("'method.", f"'adapters.{number}.settings.").splitlines()
        problems += [start + line for line in lines]
    return problems


def _drop_unknown(adapter: dict[str, Any], number: int, *, start: str) -> list[str]:
    """Take keys out of an adapter that it, or its method, does not have, and say so."""
    problems = []
    for key in [key for key in adapter if key not in _KEYS]:
        hint = did_you_mean(str(key), _KEYS)
        told = f"unknown key 'adapters.{number}.{key}'{hint}; an adapter has {', '.join(_KEYS)}"
        below = f": adapters.{number}.settings.{key}"
        problems.append(
            start + told + ("" if hint else f", and its method's settings stand below settings{below}")
        )
        del adapter[key]
    if not isinstance(adapter.get("settings"), dict):
        return problems
    method, place = str(adapter.get("method", DEFAULT_METHOD)), f"adapters.{number}.settings"
    try:
        return problems + drop_method_keys(adapter["settings"], method=method, place=place, where=start)
    except UnknownNameError:
        return problems  # the adapter itself says that there is no such method


def _name(adapter: Any, number: int) -> str:
    """An adapter in words: its number, scope and method."""
    own = adapter if isinstance(adapter, Mapping) else {}
    return f"{number} ({own.get('scope', 'model')}, {own.get('method', DEFAULT_METHOD)})"


def _count(adapters: Sequence[Any]) -> str:
    """How many adapters there are, and which."""
    names = ", ".join(_name(adapter, number) for number, adapter in enumerate(adapters))
    number = "is one adapter" if len(adapters) == 1 else f"are {len(adapters)} adapters"
    return f"there {number}, counted from 0: {names}"


def _listed(values: Mapping[str, Any]) -> list[Any]:
    """The adapters of a source as a list."""
    adapters = values.get("adapters")
    if isinstance(adapters, list):
        return list(adapters)
    method = values.get("method")
    settings = dict(method) if isinstance(method, Mapping) else {}
    return [{"scope": "model", "method": settings.pop("name", DEFAULT_METHOD), "settings": settings}]
