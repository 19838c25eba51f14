"""The arguments of `peftlab experiment`, checked as far as that needs no model; and what it says at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.catalog import EXPERIMENTS
from peftlab.commands.parsing import Parser, count
from peftlab.commands.preconditions import check_model_folder, check_writable
from peftlab.errors import ConfigError, OutputError

EXPERIMENT = "Carry out an experiment: runs that answer one question, with their table."
EXPERIMENT_USAGE = """\
Numbers and table go into a new folder. `peftlab list experiments` shows what there is; a dotted name such as
mylab.experiments.mine is a module of your own.

examples:
  peftlab experiment demo
  peftlab experiment demo --model DIR --output DIR
  peftlab experiment demo --set rank=4 --set steps=50
  peftlab experiment sweep runs/NAME/config.yaml --set space.method.rank=[4,8,16]
  peftlab experiment modules --seeds 3 --set config.task.name=e2e_nlg --set config.task.data_dir=DIR"""


@dataclass(frozen=True, slots=True)
class ExperimentRequest:
    """What a person wants to see.

    Attributes:
        name: The experiment.
        leaf: Its module.
        settings: Its settings.
        output: The folder in which the new folder is made.
    """

    name: str
    leaf: Any
    settings: Any
    output: Path = Path("experiments")


def add_experiment(parser: Parser) -> None:
    """The arguments of `experiment`.

    Args:
        parser: The parser to add them to.
    """
    parser.add_argument("name", metavar="NAME", help="the experiment, see `peftlab list experiments`")
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        type=Path,
        help="a run's config file, for experiments that vary one",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="a model's folder or hub name (default: the experiment's own)"
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        help="how many seeds; from three on a winner may be named, where seeds are compared",
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set one of the experiment's settings; again for more",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("experiments"),
        help="where the new folder goes (experiments)",
    )


def read_experiment(args: argparse.Namespace) -> ExperimentRequest:
    """What a command line of `experiment` asks for.

    Args:
        args: The parsed command line.

    Returns:
        The request.

    Raises:
        UnknownNameError: There is no such experiment.
        ConfigError: A setting is unknown, given twice or out of its range.
        ModelError: The model is written as a path, and there is no model folder.
        OutputError: The output folder cannot be written.
    """
    from peftlab.commands.overlay import put
    from peftlab.commands.sources import read_assignment
    from peftlab.files import read_yaml
    from peftlab.settings import validate

    name = EXPERIMENTS.check(args.name)
    values: dict[str, Any] = {} if args.model is None else {"model": args.model}
    leaf = EXPERIMENTS.load(name)
    if args.config is not None:
        if not {"config", "preset"} <= leaf.Settings.model_fields.keys():
            raise ConfigError(
                f"the experiment {name} takes no config file; it has: {', '.join(leaf.Settings.model_fields)}"
            )
        values |= {"config": read_yaml(args.config), "preset": None}
    if args.seeds is not None:
        values["seeds"] = count(args.seeds, "seeds")
    given: set[str] = set(values)
    for text in args.assignments:
        assignment = read_assignment(text)
        if assignment.key in given:
            raise ConfigError(f"--set {text}: {assignment.key} is given twice")
        given.add(assignment.key)
        put(values, assignment.key, assignment.value)
    if args.model is not None:
        check_model_folder(args.model)
    try:
        check_writable(args.output)
    except OutputError as error:
        raise OutputError(str(error).replace("(--output_dir, output.directory)", "(--output)")) from None
    return ExperimentRequest(name, leaf, validate(leaf.Settings, values), args.output)


def make_folder(request: ExperimentRequest) -> Path:
    """A new folder for an experiment: its name, or with -2, -3 ... behind it.

    Args:
        request: What is wanted.

    Returns:
        The folder, empty.

    Raises:
        OutputError: It cannot be made.
    """
    from peftlab.folders import choose_folder

    folder = choose_folder(request.output.expanduser(), request.name.rpartition(".")[2], "version")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    return folder


def tell_written(files: Iterable[Path]) -> str:
    """What an experiment says at the end.

    Args:
        files: The files that it wrote.

    Returns:
        One line for each.
    """
    return "\n".join(["", "written:", *(f"  {file}" for file in files)])
