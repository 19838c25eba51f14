"""The files of gradient norms: their names, their columns, and CSV that reads back bit-equal.

A record is the whole log as plain values: `clipped`, `steps`, `phases`, `norms` (group to values), `layers` (layer column
to values) and `num_parameters` (group counts, from each step at which they change).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import RunError
from peftlab.files import write_json, write_text

GROUPS = ("attention", "mlp", "embed", "lm_head", "other", "total")
"""The columns of norms; `total` is over all groups."""
GROUP_FILE, LAYER_FILE, SUMMARY_FILE = ("group_norms.csv", "layer_norms.csv", "summary.json")
PREFIX = "gradient_analysis"
_COLUMN = re.compile(r"(?:(?P<stack>\w+?)_)?layer_(?P<layer>\d+)_(?P<group>attention|mlp)", re.ASCII)
_STACKS = {"": 0, "vision": 1, "text": 2, "encoder": 3, "decoder": 4}


@dataclass(frozen=True, slots=True)
class LayerColumn:
    """What a layer column's name says.

    Attributes:
        stack: "encoder", "decoder" ..., "" for a model with one stack.
        layer: Counted from 0 in its stack.
        group: "attention" or "mlp".
    """

    stack: str
    layer: int
    group: str


def parse_column(name: str) -> LayerColumn:
    """Read a layer column's name.

    Args:
        name: E.g. `layer_0_attention`, `decoder_layer_3_mlp`.

    Returns:
        Its stack, layer and group.

    Raises:
        RunError: The name has another form.

    Example:
        >>> parse_column("decoder_layer_3_mlp")
        LayerColumn(stack='decoder', layer=3, group='mlp')
    """
    match = _COLUMN.fullmatch(name)
    if match is None:
        raise RunError(
            f"'{name}' is not a layer column; expected e.g. layer_0_attention or decoder_layer_3_mlp"
        )
    return LayerColumn(match["stack"] or "", int(match["layer"]), match["group"])


def natural_order(columns: Iterable[str]) -> list[str]:
    """Layer columns by stack (encoder before decoder), layer number, attention before MLP.

    Args:
        columns: Column names.

    Returns:
        The same, ordered.
    """

    def key(name: str) -> tuple[int, str, int, str]:
        column = parse_column(name)
        return _STACKS.get(column.stack, len(_STACKS)), column.stack, column.layer, column.group

    return sorted(columns, key=key)


def beside(stem: Path, name: str) -> Path:
    """One of the three files.

    Args:
        stem: Folder and prefix, e.g. `runs/a/gradient_analysis`.
        name: The ending, e.g. `GROUP_FILE`.

    Returns:
        Its path.
    """
    return stem.with_name(f"{stem.name}.{name}")


def write_files(stem: Path, record: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write the three files, each atomically.

    Args:
        stem: Folder and prefix.
        record: The log.
        summary: Its statistics.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    steps, columns = record["steps"], natural_order(record["layers"])
    groups = zip(steps, record["phases"], *(record["norms"][g] for g in GROUPS), strict=True)
    layers = zip(steps, *(record["layers"][c] for c in columns), strict=True)
    write_text(beside(stem, GROUP_FILE), _to_csv(["step", "phase", *GROUPS], groups))
    write_text(beside(stem, LAYER_FILE), _to_csv(["step", *columns], layers))
    write_json(beside(stem, SUMMARY_FILE), summary)


def read_files(stem: Path) -> dict[str, Any]:
    """The record of the files that begin with a stem.

    Args:
        stem: Folder and prefix. The group file must be there; the layer file and the summary are read if they are.

    Returns:
        The record; numbers may still be strings.

    Raises:
        RunError: A file is damaged.
    """
    path = beside(stem, GROUP_FILE)
    header, rows = _from_csv(path)
    if header != ["step", "phase", *GROUPS]:
        raise RunError(f"{path} is damaged: its columns are {header}, expected {['step', 'phase', *GROUPS]}")
    record: dict[str, Any] = {"clipped": False, "num_parameters": [], "layers": {}}
    record["steps"] = [row[0] for row in rows]
    record["phases"] = [row[1] or None for row in rows]
    record["norms"] = {group: [row[i] or None for row in rows] for i, group in enumerate(GROUPS, 2)}
    if (layer_path := beside(stem, LAYER_FILE)).exists():
        columns, layers = _from_csv(layer_path)
        if [row[0] for row in layers] != record["steps"]:
            raise RunError(f"{layer_path} is damaged: its steps are not those of {path.name}")
        for i, column in enumerate(columns[1:], 1):
            parse_column(column)
            record["layers"][column] = [row[i] or None for row in layers]
    if (summary_path := beside(stem, SUMMARY_FILE)).exists():
        try:
            summary = json.loads(summary_path.read_text(encoding="utf-8"))
            record |= {key: summary[key] for key in ("clipped", "num_parameters")}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{summary_path} is damaged: {type(error).__name__} {error}") from error
    return record


def _to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV; None is blank, floats read back bit-equal."""
    stream = io.StringIO()
    writer = csv.writer(stream)  # lines end as RFC 4180 says, which also makes it quote names that hold one
    writer.writerow(header)
    writer.writerows([repr(v) if isinstance(v, float) else v for v in row] for row in rows)
    return stream.getvalue()


def _from_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = list(csv.reader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if any(len(row) != len(header) for row in rows):
        raise RunError(f"{path} is damaged: a row has not the {len(header)} cells of its header")
    return header, rows
