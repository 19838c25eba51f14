"""The command line: `peftlab VERB ...`.

Nothing heavy is imported before a command needs it: help, lists, reports and config errors never load torch.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped and resumable.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peftlab import __version__
from peftlab.commands.flags import read_flags
from peftlab.commands.parsing import Parser, RunParser, add_settings, count, given_flags, read_prompts
from peftlab.errors import ConfigError, InputError, PeftlabError, UnknownNameError

_BROKEN_PIPE = 1
_INTERRUPTED_EARLY = 1


class Verb(NamedTuple):
    """One verb of the command line.

    Attributes:
        text: What it does, one line.
        usage: Examples below its help.
        add: Adds its arguments to a parser.
        do: Carries it out and returns the exit code.
        parser: The class of its parser.
    """

    text: str
    usage: str
    add: Callable[[Parser], None]
    do: Callable[[argparse.Namespace], int]
    parser: type[Parser] = Parser


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection while small things are built: it makes a light command a tenth faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command.

    Args:
        argv: The arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault(
        "PYDANTIC_DISABLE_PLUGINS", "__all__"
    )  # looking for them reads every installed package
    try:
        return _dispatch(arguments)
    except PeftlabError as error:
        if "--traceback" in arguments or os.environ.get("PEFTLAB_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        kind = "stopped" if error.exit_code == 75 else "error"
        print(f"peftlab: {kind}: " + str(error).replace("\n", "\n  "), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("peftlab: stopped before anything was saved", file=sys.stderr)
        return _INTERRUPTED_EARLY
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _dispatch(arguments: list[str]) -> int:
    """Find the verb, parse what stands after it and carry it out."""
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if first == "--version":
        print(f"peftlab {__version__}")
        return 0
    if first not in VERBS:
        if first.startswith("-"):
            raise InputError(f"the verb comes first: peftlab VERB {first}; verbs are {', '.join(VERBS)}")
        raise UnknownNameError("verb", first, VERBS)
    try:
        with _no_collection():
            args = make_parser(first).read(arguments[1:])
    except SystemExit as stop:  # argparse's own --help
        return int(stop.code or 0)
    return VERBS[first].do(args)


def make_parser(verb: str) -> Parser:
    """The parser of one verb.

    Args:
        verb: A key of `VERBS`.

    Returns:
        The parser.
    """
    chosen = VERBS[verb]
    parser = chosen.parser(
        prog=f"peftlab {verb}",
        description=chosen.text,
        epilog=chosen.usage,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=100
        ),
    )
    chosen.add(parser)
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from (also PEFTLAB_DEBUG=1)"
    )
    return parser


def _overview() -> str:
    """The text of `peftlab --help`."""
    verbs = "\n".join(f"  {name:<10}{verb.text}" for name, verb in VERBS.items())
    return (
        "usage: peftlab VERB [ARGUMENTS]\n\n"
        "A laboratory for parameter-efficient fine-tuning: shows what trained, what it cost and whether it\n"
        "worked.\n\n"
        f"verbs:\n{verbs}\n\n"
        "start with:\n"
        "  peftlab run                  fine-tune the embedded model in about two minutes\n"
        "  peftlab plan --task e2e_nlg --data_dir DIR --model DIR\n"
        "                               see what a run would do, without training\n"
        "  peftlab VERB --help          the arguments of a verb\n\n"
        "exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped and resumable"
    )


def _add_run(parser: Parser) -> None:
    """The arguments of `run`."""
    add_settings(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="RUN",
        help="go on with a stopped run (the last one where none is named) under its own settings",
    )


@_no_collection()
def _config(args: argparse.Namespace) -> Any:
    """The config that a command line asks for, its places checked."""
    from peftlab.commands.preconditions import check_places
    from peftlab.commands.sources import config_from, read_assignment

    assignments = [read_assignment(text) for text in args.assignments] + read_flags(given_flags(args))
    config = config_from(config_file=args.config, preset=args.preset, assignments=assignments)
    check_places(config)
    return config


def _run(args: argparse.Namespace) -> int:
    """Carry out `peftlab run`."""
    if args.resume is not None:
        return _resume(args)
    config = _config(args)
    from peftlab.execute import execute

    execute(config)
    return 0


def _resume(args: argparse.Namespace) -> int:
    """Carry out `peftlab run --resume`."""
    given = [f"--{flag.name}" for flag, _ in given_flags(args) if flag.name != "output_dir"]
    given += [f"--set {text}" for text in args.assignments]
    given += ([f"--preset {args.preset}"] if args.preset else []) + (
        [str(args.config)] if args.config else []
    )
    if given:
        raise ConfigError(
            f"--resume goes on with the run's own settings, so {', '.join(given)} cannot be given too;"
            " start a new run for other settings"
        )
    from peftlab.config import build_config, read_yaml

    folder = _find_run(args.resume, args.output_dir)
    config = build_config(read_yaml(folder / "config.yaml"))
    from peftlab.execute import execute

    execute(config, resume=folder)
    return 0


def _plan(args: argparse.Namespace) -> int:
    """Carry out `peftlab plan`."""
    config = _config(args)
    from peftlab.execute import plan
    from peftlab.tables import render_preflight

    print(render_preflight(plan(config)))
    return 0


def _directory(output_dir: str | None) -> Path:
    """The folder in which run folders lie."""
    if output_dir is not None:
        return Path(output_dir)
    from peftlab.config import OutputSettings

    return OutputSettings().directory


def _find_run(reference: str, output_dir: str | None) -> Path:
    """The folder of a run that is named by path, by name or as "last"."""
    from peftlab.run import RunFolder

    return Path(RunFolder.find(reference, _directory(output_dir)).path)


def _add_place(parser: Parser) -> None:
    """The argument that says where run folders lie."""
    parser.add_argument("--output_dir", metavar="DIR", help="folder in which run folders lie (default: runs)")


def _add_evaluate(parser: Parser) -> None:
    """The arguments of `evaluate`."""
    parser.add_argument(
        "reference", metavar="RUN|MODEL", help="a run (path, name or last), or a model (folder or hub name)"
    )
    parser.add_argument(
        "--task", "--dataset", metavar="TASK", help="task to score on (default: the run's own)"
    )
    parser.add_argument("--data_dir", metavar="DIR", type=Path, help="folder with the data set's own files")
    parser.add_argument("--num_samples", metavar="N", help="test examples to score (default: all)")
    parser.add_argument("--batch_size", metavar="N", help="prompts generated together")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for scores and answers")
    _add_place(parser)


def _evaluate(args: argparse.Namespace) -> int:
    """Carry out `peftlab evaluate`."""
    from peftlab.catalog import TASKS
    from peftlab.commands.preconditions import check_data_folder

    num_samples, batch_size = count(args.num_samples, "num_samples"), count(args.batch_size, "batch_size")
    task = TASKS.check(args.task) if args.task else None
    check_data_folder(args.data_dir)
    from peftlab.commands.printing import scores
    from peftlab.evaluation import evaluate_saved

    result = evaluate_saved(
        args.reference,
        task=task,
        data_dir=args.data_dir,
        num_samples=num_samples,
        batch_size=batch_size,
        output=args.output,
        directory=_directory(args.output_dir),
    )
    print(scores(result))
    return 0


def _add_generate(parser: Parser) -> None:
    """The arguments of `generate`."""
    parser.add_argument("reference", metavar="RUN", help="a run: path, name or last")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", action="append", help="what to answer; again for more")
    source.add_argument("--file", metavar="PATH", type=Path, help="text file with one prompt on each line")
    parser.add_argument(
        "--max_new_tokens", metavar="N", help="longest answer in tokens (default: as the run did)"
    )
    _add_place(parser)


def _generate(args: argparse.Namespace) -> int:
    """Carry out `peftlab generate`."""
    max_new_tokens = count(args.max_new_tokens, "max_new_tokens")
    prompts = args.prompt or read_prompts(args.file)
    from peftlab.commands.printing import side_by_side
    from peftlab.generation import answer

    directory = _directory(args.output_dir)
    for given in answer(args.reference, prompts, max_new_tokens=max_new_tokens, directory=directory):
        print(side_by_side(given["prompt"], given["adapter_on"], given["adapter_off"]))
    return 0


def _add_report(parser: Parser) -> None:
    """The arguments of `report`."""
    parser.add_argument(
        "references", metavar="RUN", nargs="+", help="a run: path, name or last; several are compared"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the page of several runs goes")
    _add_place(parser)


def _report(args: argparse.Namespace) -> int:
    """Carry out `peftlab report`."""
    runs = [_find_run(reference, args.output_dir) for reference in args.references]
    from peftlab.report import write_comparison, write_report

    if len(runs) == 1:
        if args.output is not None:
            raise InputError("--output is for several runs; the page of one run is report.html in its folder")
        print(write_report(runs[0]))
    else:
        print(write_comparison(runs, args.output))
    return 0


def _add_list(parser: Parser) -> None:
    """The arguments of `list`."""
    parser.add_argument("kind", metavar="KIND", nargs="?", help="what to list; without it, the kinds")
    parser.add_argument("--markdown", action="store_true", help="as the page docs/flags.md (flags only)")


@_no_collection()
def _list(args: argparse.Namespace) -> int:
    """Carry out `peftlab list`."""
    from peftlab.commands.listing import describe_kinds, list_kind

    print(describe_kinds() if args.kind is None else list_kind(args.kind, markdown=args.markdown))
    return 0


_SETTINGS_NOTE = """\
What wins: defaults < preset < CONFIG < command line. The defaults above are the config's own; without
CONFIG, --preset, --task and --model the run starts from the preset `embedded`, which has its own and keeps
them under any --set and flag. Dashes and underscores in flags are alike. `peftlab list flags` shows the
config key of each flag.
"""
VERBS: dict[str, Verb] = {
    "run": Verb(
        "Fine-tune, measure, score, draw and report; everything goes into one run folder.",
        _SETTINGS_NOTE
        + "\nexamples:\n  peftlab run\n  peftlab run --max_steps 100 --phase_strategy early-late\n"
        "  peftlab run --dataset e2e_nlg --data_dir DIR --model DIR --target both --r 8\n"
        "  peftlab run runs/NAME/config.yaml --set training.seed=43\n  peftlab run --resume",
        _add_run,
        _run,
        RunParser,
    ),
    "plan": Verb(
        "Show what a run would do - rows, tokens, what trains when - and stop before training.",
        _SETTINGS_NOTE,
        add_settings,
        _plan,
        RunParser,
    ),
    "evaluate": Verb(
        "Score a run's adapter or any model on a task's test split.",
        "examples:\n  peftlab evaluate last\n"
        "  peftlab evaluate MODEL --task e2e_nlg --data_dir DIR --num_samples 100",
        _add_evaluate,
        _evaluate,
    ),
    "generate": Verb(
        "Answer prompts with a run's adapter on and off, side by side.",
        'examples:\n  peftlab generate last --prompt "name[Aromi], food[Italian]"\n'
        "  peftlab generate runs/NAME --file prompts.txt",
        _add_generate,
        _generate,
    ),
    "report": Verb(
        "Write the page of a run, or one page that compares several.",
        "examples:\n  peftlab report last\n  peftlab report runs/A runs/B --output comparison.html",
        _add_report,
        _report,
    ),
    "list": Verb("Show what there is: tasks, methods, presets, config keys ...", "", _add_list, _list),
}
"""Verb to what it does, in the order of the help."""
