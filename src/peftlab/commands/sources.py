"""Where a run's settings come from: defaults < preset < config file < command line.

How one is laid over another stands in `overlay.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.commands.flags import FLAGS, Assignment
from peftlab.commands.overlay import lay_over, method_name, nest, put, single_method
from peftlab.commands.presets import PRESET_FOLDER, preset_names
from peftlab.commands.schema import config_keys
from peftlab.config import EMBEDDED_BASE, RunConfig, build_config, read_yaml
from peftlab.errors import ConfigError, UnknownNameError

EMBEDDED_PRESET = "embedded"
_EMBEDDED_TASK = "embedded"


def read_preset(name: str) -> dict[str, Any]:
    """A preset's values.

    Args:
        name: A preset, dashes and underscores alike.

    Returns:
        Its nested mapping.

    Raises:
        UnknownNameError: No such preset.
    """
    canonical = name.replace("-", "_")
    if canonical not in preset_names():
        raise UnknownNameError("preset", name, preset_names())
    return read_yaml(PRESET_FOLDER / f"{canonical}.yaml")


def read_assignment(text: str) -> Assignment:
    """Read one `--set` argument.

    Args:
        text: "training.max_steps=30"; the value is YAML, so lists, null, true and quoted text work.

    Returns:
        The assignment.

    Raises:
        ConfigError: It has no "=", no key, no value, or the value is not YAML.

    Example:
        >>> read_assignment("method.targets=[q_proj, v_proj]").value
        ['q_proj', 'v_proj']
    """
    import yaml

    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as --set training.max_steps=30")
    if not value.strip():
        raise ConfigError(f"--set {text}: there is no value after '='; write {key}=null for none")
    try:
        return Assignment(key, yaml.safe_load(value), f"--set {key}")
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {text}: the value is not YAML; lists are [a, b], text may stand in quotes"
        ) from None


def config_from(
    *, config_file: Path | None = None, preset: str | None = None, assignments: Sequence[Assignment] = ()
) -> RunConfig:
    """Build a config from all its sources.

    Args:
        config_file: A YAML file.
        preset: A preset's name; `embedded` where neither it nor a file, another task or model is given.
        assignments: What the command line sets.

    Returns:
        The config, valid and complete.

    Raises:
        ConfigError: Something is unknown, invalid or contradicts itself; all problems at once.
        UnknownNameError: No such preset.
    """
    problems: list[str] = []
    typed = nest(assignments)
    values = read_preset(preset) if preset else {}
    if preset is None and config_file is None and _is_embedded(typed):
        values = read_preset(EMBEDDED_PRESET)
    if config_file is not None:
        written = _read_file(config_file)
        problems += drop_unknown(written, method=method_name(written, values), where=f"{config_file}: ")
        values = lay_over(values, written)
    problems += drop_unknown(typed, method=method_name(typed, values))
    if "probes" in typed and "probes" not in values:
        defaults = RunConfig.model_fields["probes"].get_default(call_default_factory=True)
        values["probes"] = {name: {} for name in defaults}
    values = lay_over(values, typed, from_file=False)
    _apply_soft(values, assignments)
    _switch_probes_off(values)
    try:
        config = build_config(values)
    except ConfigError as error:
        problems += [_name_flags(line, assignments) for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def drop_unknown(values: dict[str, Any], *, method: str, where: str = "") -> list[str]:
    """Take unknown keys out of a source and say what they were.

    Args:
        values: The source, changed in place.
        method: The method whose settings may stand below `method`.
        where: Start of each message, e.g. "run.yaml: ".

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
            problems.append(f"{where}unknown key '{section}'{_suggest(section, known)}")
            del values[section]
        elif isinstance(inner, dict) and section not in ("adapters", "probes"):
            for key in [k for k in inner if f"{section}.{k}" not in known]:
                path = f"{section}.{key}"
                problems.append(
                    f"{where}unknown key '{path}'{_suggest(path, known) or _siblings(section, known)}"
                )
                del inner[key]
    return problems


def _read_file(path: Path) -> dict[str, Any]:
    """Read a config file.

    Args:
        path: The file.

    Returns:
        Its values; sections with nothing in them are left out.

    Raises:
        ConfigError: It cannot be read; says so where a preset has this name.
    """
    if not path.exists():
        hint = f"; there is a preset of this name: --preset {path}" if str(path) in preset_names() else ""
        raise ConfigError(f"there is no config file {path}{hint}")
    if path.is_dir():
        inside = f"; did you mean {path / 'config.yaml'}?" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"the config file {path} is a folder{inside}")
    return {key: value for key, value in single_method(read_yaml(path)).items() if value is not None}


def _is_embedded(typed: Mapping[str, Any]) -> bool:
    """Whether a command line leaves task and model at the embedded ones."""
    task, model = (typed.get(section) or {} for section in ("task", "model"))
    if not isinstance(task, Mapping) or not isinstance(model, Mapping):
        return False
    same_task = task.get("name", _EMBEDDED_TASK) == _EMBEDDED_TASK
    return same_task and bool(model.get("name", EMBEDDED_BASE) == EMBEDDED_BASE)


def _apply_soft(values: dict[str, Any], assignments: Sequence[Assignment]) -> None:
    """Set what only gives a value where nothing else does (`--dynamic_lora`).

    Args:
        values: All sources, changed in place.
        assignments: What the command line sets.
    """
    for given in (a for a in assignments if a.soft):
        schedule = values.get("schedule") or {}
        if isinstance(schedule, Mapping) and not schedule.get("strategy") and not schedule.get("phases"):
            put(values, given.key, given.value)


def _switch_probes_off(values: dict[str, Any]) -> None:
    """Read `probes: {gradient_norms: false}` as the probe taken out, and `true` as its defaults.

    Args:
        values: All sources, changed in place.
    """
    probes = values.get("probes")
    if isinstance(probes, Mapping):
        kept = {name: settings for name, settings in probes.items() if settings is not False}
        values["probes"] = {
            name: {} if settings in (None, True) else settings for name, settings in kept.items()
        }


def _siblings(section: str, known: Sequence[str]) -> str:
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
    close = difflib.get_close_matches(path, [*known, *sections], n=1, cutoff=0.7)
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    found = next(iter([*same, *([flag] if flag else []), *close, *near]), None)
    return f" (did you mean '{found}'?)" if found else ""


def _name_flags(line: str, assignments: Sequence[Assignment]) -> str:
    """Say after a key which flag set it.

    Args:
        line: A message that starts with a quoted key.
        assignments: What the command line sets.

    Returns:
        The message, e.g. "'method.rank' (--r): ...".
    """
    found = re.match(r"'([\w.]+)'", line)
    said = next(
        (a.said for a in assignments if found and a.key == found[1] and not a.said.startswith("--set")), None
    )
    return f"'{found[1]}' ({said}){line[found.end() :]}" if found and said else line
