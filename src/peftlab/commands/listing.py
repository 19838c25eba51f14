"""What `peftlab list KIND` prints."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence

from peftlab.catalog import CATALOGS
from peftlab.errors import UnknownNameError

Row = tuple[str, ...]


def list_kind(kind: str, *, markdown: bool = False) -> str:
    """The text for one kind of thing.

    Args:
        kind: A name from `KINDS`.
        markdown: Whether the page for the docs is wanted; only flags have one.

    Returns:
        The text.

    Raises:
        UnknownNameError: No such kind, or no page for the docs.
    """
    if markdown:
        if kind != "flags":
            raise UnknownNameError("list with --markdown", kind, ["flags"])
        return _flags_page()
    if kind in CATALOGS:
        catalog = CATALOGS[kind]
        return columns([(name, catalog.describe(name)) for name in catalog.names()])
    if kind not in _OTHERS:
        raise UnknownNameError("kind of thing to list", kind, KINDS)
    return _OTHERS[kind][0]()


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

    rows: list[Row] = [("KIND OF TASK", "TO BEGIN WITH", "BECAUSE")]
    rows += [(kind, recommend(kind).command, recommend(kind).reason) for kind in TASK_TYPES]
    note = (
        "The efficient fine-tuning document's rule of thumb. What runs on your own data say is worth more: run several"
        " methods and `full`, then `peftlab report RUN RUN ...` puts them side by side."
    )
    return f"{columns(rows)}\n\n{note}"


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
    "schema": (_schema, "the JSON schema of config files, for editors"),
}
KINDS: Iterable[str] = (*CATALOGS, *_OTHERS)
