"""Laying one source of settings over another.

A source is a nested mapping. Laying one over another merges mappings key by key and replaces everything else,
with three rules for alternatives, so that what a person writes never collides with what they did not write:

- naming another method drops the lower source's settings of its method, and the phases that were chosen for it;
- phases drop the lower source's strategy, and another strategy its phases and phase ends;
- the probes of a file are all its probes, so that a run's own config repeats it.

Within one source nothing is dropped: what collides there is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.commands.flags import Assignment
from peftlab.errors import ConfigError

DEFAULT_METHOD = "lora"
"""The method where none is named."""


def nest(assignments: Sequence[Assignment]) -> dict[str, Any]:
    """Make one nested mapping of what a command line sets.

    Args:
        assignments: The assignments; soft ones are left out.

    Returns:
        The mapping.

    Raises:
        ConfigError: Two of them set one key to different values.
    """
    said: dict[str, Assignment] = {}
    values: dict[str, Any] = {}
    problems = []
    for given in (a for a in assignments if not a.soft):
        for path, value in leaves(given.key, given.value):
            clash = next(
                (p for p in said if _overlap(p, path) and (p != path or said[p].value != value)), None
            )
            if clash is not None:
                first = said[clash]
                problems.append(
                    f"{first.said} and {given.said} set {path} to different values; give one of them"
                )
                continue
            said[path] = Assignment(path, value, given.said)
            put(values, path, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return values


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What laying a source over others takes out of them because another method is named.

    Attributes:
        source: What the lower sources are called.
        old: Their method.
        new: The method that is named.
        settings: Dotted path to value of all that is taken out.
    """

    source: str
    old: str
    new: str
    settings: Mapping[str, Any]

    def describe(self, values: Mapping[str, Any]) -> str:
        """What was taken out for good, in words.

        Args:
            values: All sources laid over each other: what they say anew is not missing.

        Returns:
            A sentence; "" where nothing is missing.
        """
        gone = {path: value for path, value in self.settings.items() if not _has(values, path)}
        if not gone:
            return ""
        told = ", ".join(f"{path}={_plain(value)}" for path, value in gone.items())
        return (
            f"note: {self.new} takes the place of {self.old}, for which {self.source} chose {told}: these are left out, and"
            f" the defaults stand in their place; all else of {self.source} stays"
        )


def left_out(lower: Mapping[str, Any], upper: Mapping[str, Any], *, source: str) -> LeftOut:
    """What `lay_over` will take out because another method is named.

    Args:
        lower: The source that gives way.
        upper: The source that wins.
        source: What the lower one is called.

    Returns:
        What is taken out; nothing where the method stays.
    """
    below, above = single_method(lower), single_method(upper)
    old, new = method_name(below, {}), method_name(above, below)
    settings: dict[str, Any] = {}
    if _exchanges(above, below):
        method = {**below["method"]} if isinstance(below.get("method"), Mapping) else {}
        method.pop("name", None)
        for section, inner in (("method", method), ("schedule", below.get("schedule"))):
            if isinstance(inner, Mapping) and inner:
                found = dict(leaves(section, inner))
                settings |= {path: value for path, value in found.items() if value not in (None, [], {})}
    several = "adapters" in above
    return LeftOut(source, f"method {old}", "the list of adapters" if several else f"method {new}", settings)


def _exchanges(above: Mapping[str, Any], below: Mapping[str, Any]) -> bool:
    """Whether one source, laid over another, brings a method or adapters of its own."""
    return "adapters" in above or method_name(above, below) != method_name(below, {})


def lay_over(lower: Mapping[str, Any], upper: Mapping[str, Any], *, from_file: bool = True) -> dict[str, Any]:
    """Lay one source over another.

    Args:
        lower: The source that gives way.
        upper: The source that wins.
        from_file: Whether `upper` is a file, whose probes are all its probes.

    Returns:
        A new mapping.

    Raises:
        ConfigError: A section of `lower` is not a mapping, so that nothing can be laid over it.
    """
    below, above = single_method(lower), single_method(upper)
    if _exchanges(above, below):
        below.pop("method", None)
        below.pop("schedule", None)
    if "adapters" in above:
        below.pop("adapters", None)
    schedule, wanted = below.get("schedule"), above.get("schedule")
    if isinstance(schedule, Mapping) and isinstance(wanted, Mapping):
        drop: tuple[str, ...] = ()
        if wanted.get("phases"):
            drop = ("strategy", "phase1_end", "phase2_end")
        elif "strategy" in wanted and wanted["strategy"] != schedule.get("strategy"):
            drop = ("phases", "phase1_end", "phase2_end")
        below["schedule"] = {key: value for key, value in schedule.items() if key not in drop}
    if from_file and "probes" in above:
        below.pop("probes", None)
    return _merge(below, above, "")


def single_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write a list of one adapter for the whole model as `method`, so that sources can be merged.

    Args:
        values: A source.

    Returns:
        A new mapping; unchanged where there are several adapters, or where both spellings are given.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    adapters = result.get("adapters")
    if "method" in result or not isinstance(adapters, list) or len(adapters) != 1:
        return result
    adapter = adapters[0]
    if not isinstance(adapter, Mapping) or not adapter.keys() <= {"scope", "method", "settings"}:
        return result
    if adapter.get("scope", "model") != "model" or not isinstance(adapter.get("settings", {}), Mapping):
        return result
    del result["adapters"]
    result["method"] = {"name": adapter.get("method", DEFAULT_METHOD), **adapter.get("settings", {})}
    return result


def method_name(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> str:
    """The method after laying one source over another.

    Args:
        upper: The source that wins.
        lower: The source that gives way.

    Returns:
        The first name that one of them gives, else the default one.
    """
    for source in (upper, lower):
        method = single_method(source).get("method")
        if isinstance(method, Mapping) and "name" in method:
            name = str(method["name"])
            return name if "." in name else name.replace("-", "_")
    return DEFAULT_METHOD


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Merge two mappings; an empty one replaces."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if not isinstance(value, Mapping) or not value or below is None:
            merged[key] = value
        elif isinstance(below, Mapping):
            merged[key] = _merge(below, value, f"{path}{key}.")
        else:
            raise ConfigError(f"'{path}{key}' must hold keys and values, not {below!r}")
    return merged


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The dotted paths below a value; an empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(f"{path}.{key}", inner)
    else:
        yield path, value


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are equal or one lies inside the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in a nested mapping."""
    *parents, last = path.split(".")
    for part in parents:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[part]
    values[last] = value


def _has(values: Mapping[str, Any], path: str) -> bool:
    """Whether a dotted path is set in a nested mapping."""
    inner: Any = values
    for part in path.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return True


def _plain(value: Any) -> str:
    """A value as a person writes it after `--set KEY=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list) else str(value)
