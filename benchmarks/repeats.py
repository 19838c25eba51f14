"""Repeats of a benchmark in a file, so that five of them can be measured in pieces: each adds to what is there."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Repeat = dict[str, Any]
"""Contender to its figures, all measured in one run; "limits" may stand beside."""


def read_repeats(path: Path | None, about: dict[str, str]) -> list[Repeat]:
    """The repeats that a file holds.

    Args:
        path: The file; None, or one that is not there, holds none.
        about: What was measured; a file of something else is refused.

    Returns:
        The repeats.
    """
    if path is None or not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    if held["about"] != about:
        differ = sorted(key for key in about if held["about"].get(key) != about[key])
        raise SystemExit(f"{path} holds repeats of other work: {', '.join(differ)} differ; give another file")
    repeats: list[Repeat] = held["repeats"]
    return repeats


def write_repeats(path: Path, about: dict[str, str], repeats: list[Repeat]) -> None:
    """Keep all repeats so far, with the machine that made them.

    Args:
        path: The file.
        about: What was measured.
        repeats: The repeats.
    """
    from peftlab.devices import describe_environment

    record = {"about": about, "repeats": repeats, "environment": describe_environment(Path(__file__).parent)}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def median_of(repeats: list[Repeat], name: str, figure: str) -> float:
    """The median of a contender's figure."""
    return statistics.median(repeat[name][figure] for repeat in repeats)


def median_ratio(repeats: list[Repeat], name: str, peer: str, figure: str) -> float:
    """The median of the ratios of a contender to a peer, each within one repeat."""
    return statistics.median(repeat[name][figure] / repeat[peer][figure] for repeat in repeats)
