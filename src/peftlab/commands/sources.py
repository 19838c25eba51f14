"""Where a run's settings come from: defaults < preset < config file < command line.

How one is laid over another stands in `overlay.py`, what is said of a key that there is not in `unknown_keys.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.commands.adapters import change_numbered, check_adapters, check_which
from peftlab.commands.flags import Assignment
from peftlab.commands.overlay import LeftOut, lay_over, left_out, method_name, nest, put, single_method
from peftlab.commands.presets import PRESET_FOLDER, preset_names
from peftlab.commands.unknown_keys import drop_unknown as drop_unknown
from peftlab.config import EMBEDDED_BASE, RunConfig, build_config
from peftlab.errors import ConfigError, UnknownNameError
from peftlab.files import read_yaml

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
    *,
    config_file: Path | None = None,
    preset: str | None = None,
    assignments: Sequence[Assignment] = (),
    tell: Callable[[str], None] | None = None,
) -> RunConfig:
    """Build a config from all its sources.

    Args:
        config_file: A YAML file.
        preset: A preset's name; `embedded` where neither it nor a file, another task or model is given.
        assignments: What the command line sets.
        tell: Receives what of a preset or file is left out because another method is named.

    Returns:
        The config, valid and complete.

    Raises:
        ConfigError: Something is unknown, invalid or contradicts itself; all problems at once.
        UnknownNameError: No such preset.
    """
    typed = nest(assignments)
    said = {given.key: given.said for given in assignments if not given.said.startswith("--set")}
    if preset is None and config_file is None and _is_embedded(typed):
        preset = EMBEDDED_PRESET
    values = read_preset(preset) if preset else {}
    names = [f"the preset {preset}"] if preset else []
    problems: list[str] = []
    left: list[LeftOut] = []
    if config_file is not None:
        written = _read_file(config_file)
        problems += check_adapters(written, where=f"{config_file}: ")
        if problems:  # what is numbered would be counted in a list that is not there
            typed.pop("adapters", None)
        problems += drop_unknown(written, method=method_name(written, values), where=f"{config_file}: ")
        left.append(left_out(values, written, source=" and ".join(names)))
        values = lay_over(values, written)
        names.append(str(config_file))
    values, wrong = _check_adapters_typed(typed, values, said)
    problems += wrong
    problems += drop_unknown(typed, method=method_name(typed, values), said=said)
    if "probes" in typed and "probes" not in values:
        defaults = RunConfig.model_fields["probes"].get_default(call_default_factory=True)
        values["probes"] = {name: {} for name in defaults}
    left.append(left_out(values, typed, source=" and ".join(names)))
    values = lay_over(values, typed, from_file=False)
    _apply_soft(values, assignments)
    _switch_probes_off(values)
    try:
        config = build_config(values)
    except ConfigError as error:
        problems += [_name_flags(line, assignments) for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    if tell is not None:
        for note in filter(None, (part.describe(values) for part in left)):
            tell(note)
    return config


def _check_adapters_typed(
    typed: dict[str, Any], values: Mapping[str, Any], said: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """What a command line says of adapters: laid over those below where it says so by number, and checked.

    Args:
        typed: What the command line sets; what is laid over or wrong is taken out.
        values: The sources below.
        said: Dotted key to the flag that set it.

    Returns:
        The sources below with the changes, and what is wrong.
    """
    problems = check_which(typed, values, said)
    changed, wrong = change_numbered(values, typed)
    return changed, [*problems, *wrong, *check_adapters(typed)]


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
