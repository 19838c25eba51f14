"""The arguments of `peftlab together`: the configs of runs that train over one base, or the runs to go on with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.commands.parsing import Parser
from peftlab.errors import ConfigError, InputError

if TYPE_CHECKING:
    from peftlab.config import RunConfig

TOGETHER = "Carry out several runs of LoRA over one base, each pass computed once for all."
TOGETHER_USAGE = """\
The runs may differ in all of LoRA's settings, in rates, seeds, steps, phases and evaluation. They share base,
task, data and layout. Each has a run folder of its own and ends as `peftlab run` of its config ends.

examples:
  peftlab together small.yaml wide.yaml
  peftlab together lora.yaml --each training.seed=[1, 2, 3, 4]
  peftlab together lora.yaml --each method.rank=[4, 8] --each training.learning_rate=[1e-4, 2e-4]
  peftlab together --resume runs/A runs/B     go on with stopped runs; one alone: peftlab run --resume"""


def add_together(parser: Parser) -> None:
    """The arguments of `together`.

    Args:
        parser: The parser to add them to.
    """
    parser.usage = (
        f"{parser.prog} CONFIG [CONFIG ...] [--each KEY=[A, B, ...]] [--set KEY=VALUE ...] | --resume RUN ..."
    )
    parser.add_argument(
        "configs", metavar="CONFIG", nargs="*", type=Path, help="YAML files; any run's config.yaml is one"
    )
    parser.add_argument(
        "--each",
        dest="each",
        metavar="KEY=LIST",
        action="append",
        default=[],
        help="one run for each value, of one CONFIG; several of these go side by side and have equally many values",
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set any config key, in all runs; again for more keys",
    )
    parser.add_argument(
        "--resume", metavar="RUN", nargs="+", default=[], help="runs to go on with: path or name"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="folder in which run folders lie (default: runs)")


def read_together(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, RunConfig]:
    """The configs that a command line asks for.

    Args:
        args: The parsed command line.
        tell: Receives what of a config is left out because another method is named.

    Returns:
        What a message calls the run, to its config.

    Raises:
        ConfigError: A config does not hold, or the values of `--each` do not fit.
        InputError: No config is named.
    """
    from peftlab.commands.preconditions import check_places
    from peftlab.commands.sources import config_from, read_assignment

    if not args.configs:
        raise InputError(
            "name the configs of the runs that train together: peftlab together A.yaml B.yaml; or one, with --each"
        )
    fixed = [read_assignment(text) for text in args.assignments]
    if args.output_dir is not None:
        fixed.append(read_assignment(f"output.directory={args.output_dir}"))
    found: dict[str, RunConfig] = {}
    for path in args.configs:
        for said, own in _variants(args.each, one=len(args.configs) == 1).items():
            name = _unused(f"{path} {said}".strip(), found)
            found[name] = config_from(config_file=path, assignments=[*fixed, *own], tell=tell)
            check_places(found[name])
    return found


def read_resumed(args: argparse.Namespace, find: Callable[[str, str | None], Path]) -> list[Path]:
    """The run folders that a command line wants to go on with.

    Args:
        args: The parsed command line.
        find: Run and folder of runs to the run's folder.

    Returns:
        The folders.

    Raises:
        ConfigError: Settings are given too.
        InputError: A run is named twice, or is not there.
    """
    given = [str(path) for path in args.configs]
    given += [f"--set {text}" for text in args.assignments] + [f"--each {text}" for text in args.each]
    if given:
        raise ConfigError(
            f"--resume goes on with the runs' own settings, so {', '.join(given)} cannot be given too; start new runs for"
            " other settings"
        )
    folders = [find(reference, args.output_dir) for reference in args.resume]
    twice = [str(folder) for folder in folders if folders.count(folder) > 1]
    if twice:
        raise InputError(f"the run {twice[0]} is named more than once")
    return folders


def _variants(each: list[str], *, one: bool) -> dict[str, list[Any]]:
    """What is set in each run of a config: how it is told, to the assignments."""
    from peftlab.commands.flags import Assignment
    from peftlab.commands.sources import read_assignment

    if not each:
        return {"": []}
    if not one:
        raise ConfigError("--each makes several runs of one config; name one CONFIG, or leave --each out")
    read = [read_assignment(text) for text in each]
    for assignment in read:
        if not isinstance(assignment.value, list) or not assignment.value:
            raise ConfigError(
                f"--each {assignment.key}: expected a list, such as --each {assignment.key}=[1, 2], not"
                f" {assignment.value!r}"
            )
    lengths = {assignment.key: len(assignment.value) for assignment in read}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ConfigError(f"--each: the lists go side by side and must be equally long: {told} values")
    found: dict[str, list[Any]] = {}
    for number in range(len(read[0].value)):
        own = [Assignment(a.key, a.value[number], f"--each {a.key}") for a in read]
        found[_unused(", ".join(f"{a.key}={a.value}" for a in own), found)] = own
    return found


def _unused(name: str, taken: Any) -> str:
    """A name, with a number behind it where it is taken."""
    number, wanted = 1, name
    while wanted in taken:
        number += 1
        wanted = f"{name} ({number})"
    return wanted
