"""The command line: `peftlab VERB ...`.

Nothing heavy is imported before a command needs it: help, lists, reports and config errors never load torch.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped and resumable.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from peftlab import __version__
from peftlab.commands.parsing import Parser
from peftlab.errors import InputError, PeftlabError, UnknownNameError
from peftlab.verbs import VERBS, no_collection

_BROKEN_PIPE = 1
_INTERRUPTED_EARLY = 1


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
        with no_collection():
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
    verbs = "\n".join(f"  {name:<12}{verb.text}" for name, verb in VERBS.items())
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
