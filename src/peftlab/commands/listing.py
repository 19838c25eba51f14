"""What `peftlab list KIND` prints."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from peftlab.catalog import CATALOGS
from peftlab.errors import InputError, UnknownNameError

Row = tuple[str, ...]
_RUNS = (Path("runs"), Path("experiments") / "runs")
"""Where runs lie by default."""
KINDS_WITH_SETTINGS = ("methods", "tasks", "probes")
"""Kinds of which one by name can be listed."""


def list_kind(
    kind: str, *, name: str | None = None, method: str | None = None, markdown: bool = False
) -> str:
    """The text for one kind of thing, or for one thing of it.

    Args:
        kind: A name from `KINDS`.
        name: One of the kind, whose settings are wanted.
        method: With the kind "config", the method whose settings are wanted.
        markdown: Whether the page for the docs is wanted.

    Returns:
        The text.

    Raises:
        UnknownNameError: No such kind, no such thing of it, or no page for the docs.
        InputError: Single ones of this kind are not listed, or a method has no meaning here.
    """
    if markdown:
        if kind not in _PAGES:
            raise UnknownNameError("list with --markdown", kind, _PAGES)
        if name is not None or method is not None:
            raise InputError(f"--markdown is for the whole page: peftlab list {kind} --markdown")
        return _PAGES[kind]()
    if kind not in KINDS:
        raise UnknownNameError("kind of thing to list", kind, KINDS)
    if method is not None and kind != "config":
        raise InputError(
            f"--method goes with config: peftlab list config --method {method} shows that method's settings"
        )
    if method is not None:
        kind, name = "methods", method if name is None else name
    if name is not None:
        return _one(kind, name)
    if kind in CATALOGS:
        catalog = CATALOGS[kind]
        table = columns([(leaf, catalog.describe(leaf)) for leaf in catalog.names()])
        return (
            f"{table}\n\nthe settings of one: peftlab list {kind} NAME"
            if kind in KINDS_WITH_SETTINGS
            else table
        )
    return _OTHERS[kind][0]()


def _one(kind: str, name: str) -> str:
    """The settings of one leaf."""
    if kind not in KINDS_WITH_SETTINGS:
        raise InputError(
            f"`peftlab list {kind}` takes no name; single ones are listed of {', '.join(KINDS_WITH_SETTINGS)} and peft_types"
        )
    from peftlab.commands import leaf_settings

    rows = leaf_settings.setting_rows(kind, name)
    table = columns(rows) if len(rows) > 1 else "it has no settings of its own"
    parts = [leaf_settings.heading(kind, name), table, leaf_settings.notes(kind, name)]
    return "\n\n".join(part for part in parts if part)


def describe_kinds() -> str:
    """The kinds with what each one is."""
    texts = {
        "tasks": "what a model can be taught: data, prompt, metrics",
        "methods": "ways to make a base tunable",
        "metrics": "how answers are scored",
        "probes": "what is measured during training",
        "experiments": "questions that `peftlab experiment` answers by runs of its own",
    }
    return columns([(kind, texts.get(kind) or _OTHERS[kind][1]) for kind in KINDS])


def columns(rows: Sequence[Row], *, width: int | None = None) -> str:
    """Lay rows out in columns, the last one wrapped.

    Args:
        rows: Rows of equal length.
        width: Width of the whole in characters; None takes the terminal's, at most 120.

    Returns:
        The text, without a newline at the end.

    Example:
        >>> print(columns([("a", "first"), ("bbb", "second")]))
        a    first
        bbb  second
    """
    total = width or min(120, shutil.get_terminal_size((100, 24)).columns)
    sizes = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)][:-1]
    left = sum(sizes) + 2 * len(sizes)
    lines = []
    for row in rows:
        start = "".join(cell.ljust(size + 2) for cell, size in zip(row[:-1], sizes, strict=True))
        wrapped = textwrap.wrap(row[-1], max(30, total - left)) or [""]
        lines += [(start + wrapped[0]).rstrip(), *(" " * left + line for line in wrapped[1:])]
    return "\n".join(lines)


def _families() -> str:
    from peftlab.commands.families import tell_families

    return tell_families()


def _presets() -> str:
    from peftlab.commands.presets import describe_preset, preset_names

    return columns([(name, describe_preset(name)) for name in preset_names()])


def _guide() -> str:
    from peftlab.method_guide import TASK_TYPES, recommend
    from peftlab.recommending import weigh_runs
    from peftlab.run import RunFolder

    rows: list[Row] = [("KIND OF TASK", "METHOD", "TO BEGIN WITH", "BECAUSE")]
    for kind in TASK_TYPES:
        advice = recommend(kind)
        rows.append((kind, advice.name, advice.command, advice.reason))
    note = (
        "The efficient fine-tuning document's rule of thumb. What runs on your own data say is worth more: `peftlab"
        " experiment methods` compares them, and `peftlab report RUN RUN ...` puts runs side by side."
    )
    found = [text for folder in _RUNS if folder.is_dir() for text in weigh_runs(RunFolder.all_in(folder))]
    return "\n\n".join([columns(rows), note, *(f"Your runs: {text}." for text in found)])


def _strategies() -> str:
    from peftlab.schedule import STRATEGIES

    rows = []
    for name, phases in STRATEGIES.items():
        parts = [
            half or "+".join(("all" if phase.startswith("both") else phase,)) for phase, _, half in phases
        ]
        rows.append((name, name.replace("->", "-"), "trains " + ", then ".join(parts)))
    return columns(rows)


def _targets() -> str:
    from peftlab.family import SEED_SPELLINGS, TARGET_GROUPS

    rows = list(TARGET_GROUPS.items())
    rows += [(spelling, f"S1's spelling of {name}") for spelling, name in SEED_SPELLINGS.items()]
    note = "A target may also be a role (attention.query), a module name (q_proj), or a list of these."
    return f"{columns(rows)}\n\n{note}"


def _flags() -> str:
    from peftlab.commands.flags import FLAGS, config_part
    from peftlab.commands.schema import config_keys

    defaults = {key.path: key.default for key in config_keys()}
    rows: list[Row] = [("FLAG", "CONFIG KEY", "DEFAULT", "WHAT IT IS FOR")]
    for flag in FLAGS:
        default = _default(defaults[flag.key]) if flag.metavar else ""
        rows.append((", ".join(flag.spellings), config_part(flag), default, flag.help))
    return columns(rows)


def _flags_page() -> str:
    from peftlab.commands.flags import markdown_table
    from peftlab.commands.schema import config_keys

    defaults = {key.path: _default(key.default) for key in config_keys()}
    return markdown_table(defaults.__getitem__).rstrip("\n")


def _default(text: str) -> str:
    """A default for people: none where the config says null."""
    return "none" if text == "null" else text


def _config() -> str:
    from peftlab.commands.schema import config_keys

    rows: list[Row] = [("KEY", "DEFAULT", "WHAT IT IS FOR [TYPE]")]
    rows += [(key.path, key.default, f"{key.text} [{key.kind}]") for key in config_keys()]
    return columns(rows)


def _peft_types() -> str:
    from peftlab.commands.peft_types import tell_types

    return tell_types()


def _peft_types_page() -> str:
    from peftlab.commands.peft_types import types_page

    return types_page()


def _schema() -> str:
    from peftlab.commands.schema import json_schema

    return json.dumps(json_schema(), indent=2, ensure_ascii=False)


_OTHERS: dict[str, tuple[Callable[[], str], str]] = {
    "guide": (_guide, "which method to begin with, by kind of task"),
    "presets": (_presets, "ready-made configs for --preset"),
    "strategies": (_strategies, "orders in which parts of the adapter train, for --phase_strategy"),
    "targets": (_targets, "groups of modules that an adapter can stand beside, for --target"),
    "flags": (_flags, "the short spellings of config keys"),
    "config": (_config, "every config key with type, default and meaning"),
    "families": (_families, "architectures: what is proved of each, measured on this version's transformers"),
    "peft_types": (_peft_types, "types of peft for --method peft: which work, and why the others do not"),
    "schema": (_schema, "the JSON schema of config files, for editors"),
}
_PAGES: dict[str, Callable[[], str]] = {"flags": _flags_page, "peft_types": _peft_types_page}
KINDS: Iterable[str] = (*CATALOGS, *_OTHERS)
