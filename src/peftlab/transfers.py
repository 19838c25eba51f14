"""What `peftlab import` and `peftlab export` do; nothing heavy is loaded before one of them is carried out."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from peftlab.commands import importing as arguments
from peftlab.commands.parsing import Parser


def carry_import(args: argparse.Namespace) -> int:
    """Carry out `peftlab import`.

    Args:
        args: The parsed command line.

    Returns:
        The exit code.
    """
    asked = arguments.read_import(args)
    from peftlab.importing.adapter import import_adapter

    print(import_adapter(**asked))
    return 0


def carry_export(args: argparse.Namespace) -> int:
    """Carry out `peftlab export`.

    Args:
        args: The parsed command line.

    Returns:
        The exit code.
    """
    asked = arguments.read_export(args)
    from peftlab.exporting import export_adapter

    print(export_adapter(**asked))
    return 0


Parts = tuple[str, str, Callable[[Parser], None], Callable[[argparse.Namespace], int]]
TRANSFERS: dict[str, Parts] = {
    "import": (arguments.IMPORT, arguments.IMPORT_USAGE, arguments.add_import, carry_import),
    "export": (arguments.EXPORT, arguments.EXPORT_USAGE, arguments.add_export, carry_export),
}
"""Verb to what `verbs.Verb` is made of."""
