"""The arguments of `peftlab import` and `peftlab export`, checked as far as that needs no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from peftlab.commands.flags import read_float
from peftlab.commands.parsing import Parser
from peftlab.commands.preconditions import check_model_folder, check_writable
from peftlab.errors import ConfigError, OutputError
from peftlab.folders import OnConflict, check_name

IMPORT = "Make a bundle out of somebody else's adapter: a plain peft folder, or a file of loralib."
IMPORT_USAGE = """\
SOURCE is a folder with adapter_config.json and adapter_model.safetensors, or a file of loralib. The bundle
goes into DIR/NAME, and holds the adapter by a method of `peftlab list methods`; what no method can express
is refused with the keys. A file of torch's own format is read, tensors only, with --torch_file alone.

examples:
  peftlab import ADAPTER --base MODEL --output adapters --name samsum
  peftlab import roberta_base_lora_mnli.bin --base roberta-base --output adapters --name mnli --torch_file \\
      --alpha 16 --labels entailment,neutral,contradiction
"""
EXPORT = "Write a run's or bundle's adapter as a plain peft folder, for places without peftlab."
EXPORT_USAGE = """\
The folder DIR/NAME holds adapter_config.json, adapter_model.safetensors and a README. Methods that peft does
not know are refused: peftlab.load loads them.

examples:
  peftlab export last --output plain
  peftlab export adapters/mnli --output plain --name mnli --on_conflict version
"""


def add_import(parser: Parser) -> None:
    """The arguments of `import`.

    Args:
        parser: The parser to add them to.
    """
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a peft folder, or a file of loralib")
    parser.add_argument("--base", metavar="MODEL", required=True, help="the base: a folder or a hub name")
    _add_place(parser)
    parser.add_argument(
        "--labels", metavar="LIST", help="names of a classifier's classes, A,B,C (default: the base's own)"
    )
    parser.add_argument("--alpha", metavar="X", help="loralib's lora_alpha, which its files do not hold")
    parser.add_argument(
        "--merged",
        metavar="LIST",
        help="which of query,key,value loralib's merged layers adapt (its files do not say)",
    )
    parser.add_argument(
        "--torch_file", action="store_true", help="read a file of torch's own format, tensors only"
    )
    parser.add_argument(
        "--ignore",
        metavar="FIELD",
        action="append",
        default=[],
        help="a field of adapter_config.json that shall not be heeded; again for more",
    )


def add_export(parser: Parser) -> None:
    """The arguments of `export`.

    Args:
        parser: The parser to add them to.
    """
    parser.add_argument(
        "source", metavar="RUN|BUNDLE", help="a run (path, name or last), or a bundle's folder"
    )
    _add_place(parser)
    parser.add_argument("--output_dir", metavar="DIR", help="folder in which run folders lie (default: runs)")


def _add_place(parser: Parser) -> None:
    """The arguments that say where the new folder goes."""
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder in which the new folder is made"
    )
    parser.add_argument(
        "--name",
        "--task",
        dest="name",
        metavar="NAME",
        help="the new folder's name, such as the task (default: the source's)",
    )
    parser.add_argument(
        "--on_conflict",
        metavar="WHAT",
        default="refuse",
        help="where NAME is there already: refuse (the default), version (NAME-2 beside it) or overwrite",
    )


def read_import(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line of `import` asks for.

    Args:
        args: The parsed command line.

    Returns:
        The arguments of `import_adapter`.

    Raises:
        ConfigError: A value cannot be read.
        InputError: The name is not safe.
        ModelError: The base is written as a path, and there is no model folder.
        OutputError: The output folder cannot be written.
    """
    check_model_folder(args.base)
    return _read_place(args) | {
        "base": args.base,
        "labels": _split(args.labels, "labels"),
        "alpha": None if args.alpha is None else _number(args.alpha, "alpha"),
        "merged": _split(args.merged, "merged"),
        "torch_file": args.torch_file,
        "ignored": tuple(args.ignore),
    }


def read_export(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line of `export` asks for.

    Args:
        args: The parsed command line.

    Returns:
        The arguments of `export_adapter`.

    Raises:
        ConfigError: A value cannot be read.
        InputError: The name is not safe.
        OutputError: The output folder cannot be written.
    """
    runs = Path("runs") if args.output_dir is None else Path(args.output_dir)
    return _read_place(args) | {"runs": runs}


def _read_place(args: argparse.Namespace) -> dict[str, Any]:
    """Source, folder, name, and what happens to a name that is there."""
    if args.on_conflict not in get_args(OnConflict):
        raise ConfigError(f"--on_conflict {args.on_conflict}: it is one of {', '.join(get_args(OnConflict))}")
    if args.name is not None:
        check_name(args.name)
    try:
        check_writable(args.output)
    except OutputError as error:
        raise OutputError(str(error).replace("(--output_dir, output.directory)", "(--output)")) from None
    return {
        "source": args.source,
        "output": args.output,
        "name": args.name,
        "on_conflict": args.on_conflict,
    }


def _split(text: str | None, flag: str) -> tuple[str, ...]:
    """Names, from "A,B,C"."""
    if text is None:
        return ()
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise ConfigError(f"--{flag} {text}: a name is empty; write them as A,B,C")
    return names


def _number(text: str, flag: str) -> float:
    """A number."""
    try:
        return read_float(text)
    except ConfigError as error:
        raise ConfigError(f"--{flag}: {error}") from None
