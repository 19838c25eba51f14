"""What `peftlab list` does; nothing heavy is loaded unless something is measured, or peft's own fields are asked for."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from peftlab.commands.parsing import Parser
from peftlab.errors import InputError

LIST = "Show what there is: tasks, methods, presets, config keys ..."
LIST_USAGE = """\
examples:
  peftlab list methods
  peftlab list methods adalora       what can be set on it; also: peftlab list config --method adalora
  peftlab list peft_types loha       the fields of one of peft's types
"""


def add_list(parser: Parser) -> None:
    """The arguments of `list`.

    Args:
        parser: The parser to add them to.
    """
    parser.add_argument("kind", metavar="KIND", nargs="?", help="what to list; without it, the kinds")
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="one method, task, probe or type of peft: what can be set on it",
    )
    parser.add_argument("--method", metavar="NAME", help="with config: the settings of this method")
    parser.add_argument("--markdown", action="store_true", help="as a page of docs/: flags and peft_types")
    parser.add_argument(
        "--prove", action="store_true", help="measure anew: families (some minutes), methods (four)"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for what --prove measures")


def carry_list(args: argparse.Namespace) -> int:
    """Carry out `peftlab list`.

    Args:
        args: The parsed command line.

    Returns:
        The exit code.

    Raises:
        InputError: Arguments do not go together, or there is nothing of that name.
    """
    from peftlab.commands.listing import describe_kinds, list_kind

    if args.prove or args.output is not None:
        return _prove(args)
    if args.kind is None:
        print(describe_kinds())
    elif args.kind == "peft_types" and args.name is not None:
        gc.enable()
        from peftlab.attaching.peft_type_fields import describe_type

        print(describe_type(args.name))
    else:
        print(list_kind(args.kind, name=args.name, method=args.method, markdown=args.markdown))
    return 0


def _prove(args: argparse.Namespace) -> int:
    """Carry out `peftlab list KIND --prove`."""
    if args.kind not in ("families", "methods") or not args.prove or args.name or args.method:
        raise InputError(
            "--prove and --output go with families and methods: peftlab list families --prove [--output DIR]"
        )
    if args.output is not None:
        from peftlab.commands.preconditions import check_writable

        check_writable(args.output)
    gc.enable()
    result: dict[str, Any]
    if args.kind == "methods":
        from peftlab.capabilities import prove_methods
        from peftlab.commands import methods as page

        result = prove_methods()
    else:
        from peftlab.commands import families as page  # type: ignore[no-redef]
        from peftlab.coverage import prove_families

        result = prove_families()
    if args.output is not None:
        page.keep(result, args.output)
    print(page.render(result))
    return 0
