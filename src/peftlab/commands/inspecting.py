"""The arguments of `peftlab inspect`, checked as far as that needs no model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from peftlab.commands.flags import read_int
from peftlab.commands.parsing import Parser
from peftlab.commands.preconditions import check_writable
from peftlab.errors import ConfigError, InputError, OutputError

INSPECT = "Look into a model: its map, facts, certificate, attention, and what a run changed; or compare two."
INSPECT_USAGE = """\
A page and its numbers go into a new folder. MODEL is a folder, a name on the hub, `embedded`, or a run (path,
name or last), whose adapter is then shown too, with a second page, before_after.html: base against tuned model in
one pass where peft can. Without --text a sentence of peftlab's own is read, and there the run's own test rows.

examples:
  peftlab inspect embedded
  peftlab inspect MODEL --text "The cat sat on the mat." --layers 0,5,11
  peftlab inspect MODEL --no_text            the map, the facts and the shares; no weights are read
  peftlab inspect last --general_text notes.txt    what the run changed, and what it forgot of these lines
  peftlab inspect embedded last              a base and what a run made of it, side by side
"""
DEFAULT_TEXT = "The cook who runs the small kitchen makes soup for the people in the street, and the people thank the cook."
"""What is read where nothing is given: words come again, so that heads that look for them can be seen."""


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """What a person wants to look into.

    Attributes:
        references: One model, or two to compare: each a folder, a name on the hub, "embedded", or a run.
        texts: What the models read; empty for the structure alone, without weights.
        decoder_texts: What a decoder beside an encoder has written, one for each text; empty for the texts themselves.
        layers: Layers whose attention is shown word by word; None for the first, the middle and the last.
        output: The folder in which the new folder is made.
        runs: Where run folders lie.
        device: auto, cpu, cuda, mps.
        general_text: Text that the run's task does not have, one passage a line; None for peftlab's own.
    """

    references: tuple[str, ...]
    texts: tuple[str, ...] = (DEFAULT_TEXT,)
    decoder_texts: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    output: Path = Path("inspections")
    runs: Path = Path("runs")
    device: str = "auto"
    general_text: Path | None = None


def add_inspect(parser: Parser) -> None:
    """The arguments of `inspect`.

    Args:
        parser: The parser to add them to.
    """
    parser.add_argument(
        "references",
        metavar="MODEL",
        nargs="+",
        help="a folder, a hub name, embedded or a run; two are compared",
    )
    reading = parser.add_mutually_exclusive_group()
    reading.add_argument(
        "--text", metavar="TEXT", action="append", help="what the model reads; again for more"
    )
    reading.add_argument("--no_text", action="store_true", help="the structure alone: no weights are read")
    parser.add_argument(
        "--decoder_text",
        metavar="TEXT",
        action="append",
        help="what the decoder of an encoder-decoder has written, one for each text (default: the text)",
    )
    parser.add_argument(
        "--layers",
        metavar="LIST",
        help="layers whose attention is shown, 0,5,11 (default: first, middle, last)",
    )
    parser.add_argument(
        "--general_text",
        metavar="FILE",
        type=Path,
        help="text that the run's task does not have, one passage a line, to see what was forgotten",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("inspections"),
        help="where the new folder goes (inspections)",
    )
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--output_dir", metavar="DIR", help="folder in which run folders lie (default: runs)")


def read_inspect(args: argparse.Namespace) -> InspectRequest:
    """What a command line of `inspect` asks for.

    Args:
        args: The parsed command line.

    Returns:
        The request.

    Raises:
        InputError: More than two models.
        ConfigError: A text is empty, decoder texts do not match the texts, or the layers cannot be read.
        OutputError: The output folder cannot be written.
    """
    if len(args.references) > 2:
        raise InputError(f"{len(args.references)} models are given: inspect looks into one, or compares two")
    texts = () if args.no_text else tuple(args.text or (DEFAULT_TEXT,))
    written = tuple(args.decoder_text or ())
    for flag, given in (("--text", texts), ("--decoder_text", written)):
        if any(not text.strip() for text in given):
            raise ConfigError(f"{flag} is empty: give some words, or leave it out")
    if written and not texts:
        raise ConfigError("--decoder_text has no effect with --no_text: the decoder is shown reading a text")
    if written and len(written) != len(texts):
        raise ConfigError(f"{len(written)} --decoder_text for {len(texts)} --text: give one for each")
    layers = None if args.layers is None else _read_layers(args.layers)
    if layers is not None and not texts:
        raise ConfigError("--layers has no effect with --no_text: attention needs a text")
    try:
        check_writable(args.output)
    except OutputError as error:
        raise OutputError(str(error).replace("(--output_dir, output.directory)", "(--output)")) from None
    runs = Path("runs") if args.output_dir is None else Path(args.output_dir)
    general: Path | None = args.general_text
    if general is not None:
        _check_general(general, read=bool(texts), compared=len(args.references) > 1)
    return InspectRequest(
        tuple(args.references), texts, written, layers, args.output, runs, args.device, general
    )


def _check_general(file: Path, *, read: bool, compared: bool) -> None:
    """Refuse general text that would have no effect or is not there."""
    if not read:
        raise ConfigError("--general_text has no effect with --no_text: no weights are read")
    if compared:
        raise ConfigError("--general_text has no effect where two models are compared: name one run")
    if not file.expanduser().is_file():
        raise ConfigError(
            f"--general_text {file}: there is no such file; give a text file, one passage a line"
        )


def _read_layers(text: str) -> tuple[int, ...]:
    """Layers, from "0,5,11"."""
    try:
        layers = tuple(read_int(part) for part in text.split(","))
    except ConfigError as error:
        raise ConfigError(f"--layers {text}: {error}; write them as 0,5,11") from None
    if min(layers) < 0:
        raise ConfigError(f"--layers {text}: layers count from 0")
    return layers
