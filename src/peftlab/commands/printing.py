"""Scores and answers as text for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any


def terminal_width() -> int:
    """Characters in a line: the terminal's, between 60 and 120."""
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))


def scores(evaluation: Mapping[str, Any]) -> str:
    """The scores of an evaluation, before and after where both are there.

    Args:
        evaluation: The content of `{task}_evaluation.json`, or one of its parts.

    Returns:
        One line for each metric and part.
    """
    parts = {part: _metric_lines(evaluation.get(part)) for part in ("before", "after")}
    found = {part: lines for part, lines in parts.items() if lines}
    if len(found) < 2:
        return "\n".join(next(iter(found.values()), _metric_lines(evaluation)))
    return "\n".join(f"{part:<7} {line}" for part, lines in found.items() for line in lines)


def side_by_side(prompt: str, adapter_on: str, adapter_off: str) -> str:
    """One prompt with the answers of the adapter and of the base.

    Args:
        prompt: The prompt.
        adapter_on: The answer with the adapter.
        adapter_off: The answer of the base alone.

    Returns:
        The prompt, and the answers in two columns.
    """
    total = terminal_width()
    half = (total - 3) // 2
    left = ["ADAPTER ON", *_wrapped(adapter_on, half)]
    right = ["ADAPTER OFF", *_wrapped(adapter_off, half)]
    rows = [f"{a:<{half}} | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    return "\n".join(["-" * total, *_wrapped(prompt, total), "", *rows])


def _metric_lines(part: Any) -> list[str]:
    """One line for each metric of one part of an evaluation."""
    if not isinstance(part, Mapping):
        return []
    lines = []
    for name, score in part.get("metrics", {}).items():
        interval = score.get("interval")
        span = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        lines.append(f"{name:<20} {score['value']:8.2f}{span}  ({score['unit']}, n={score['count']})")
    return lines + [f"{name:<20} not computed: {why}" for name, why in part.get("not_computed", {}).items()]


def _wrapped(text: str, width: int) -> list[str]:
    """A text in lines of a width, its own line breaks kept."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]] or [
        "(nothing)"
    ]
