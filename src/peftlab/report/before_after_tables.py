"""Base against tuned model as tables, and as they are read again: no torch, no page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]
"""The content of `before_after.json`, or a part of it."""


def stacks_of(document: Document) -> Iterable[tuple[Document, Document]]:
    """Every kind of passages with every stack that read them.

    Args:
        document: What was measured.

    Returns:
        Pairs, in order.
    """
    return ((passages, stack) for passages in document["passages"] for stack in passages["stacks"])


def layer_rows(document: Document) -> list[dict[str, Any]]:
    """One row for each kind of passages, stack and layer.

    Args:
        document: What was measured.

    Returns:
        The rows; `layer` is "output" for what the whole model says.
    """
    found = []
    for passages, stack in stacks_of(document):
        begin = {"passages": passages["name"], "stack": stack["stack"]}
        found += [begin | row for row in stack["layers"]]
        if stack["output"]:
            found.append(begin | {"layer": "output"} | stack["output"])
    return found


def head_rows(document: Document) -> list[dict[str, Any]]:
    """One row for each head.

    Args:
        document: What was measured.

    Returns:
        The rows.
    """
    return [
        {
            "passages": passages["name"],
            "stack": stack["stack"],
            "kind": seen["kind"],
            "layer": layer["layer"],
            "head": head,
            "js": js,
            "tv": tv,
        }
        for passages, stack in stacks_of(document)
        for seen in stack["attention"]
        for layer in seen["layers"]
        for head, (js, tv) in enumerate(zip(layer["js"], layer["tv"], strict=True))
    ]


def module_rows(document: Document) -> list[dict[str, Any]]:
    """One row for each module that has moved.

    Args:
        document: What was measured.

    Returns:
        The rows.
    """
    return [
        module | {"shape": " x ".join(map(str, module["shape"])), "notes": "; ".join(module["notes"])}
        for module in document["modules"]
    ]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV.

    Args:
        rows: The rows.

    Returns:
        A line for each, with every column that any of them has.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
