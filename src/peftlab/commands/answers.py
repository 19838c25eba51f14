"""Examples with their answers and scores as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.commands.printing import terminal_width
from peftlab.report.answers import KINDS, describe_entry

NUM_PRINTED = 2
"""Examples of each kind that a terminal shows; the page has more."""
_MARGIN = 12


def shown_examples(half: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The examples that an evaluation chose to show: best, worst, and drawn at random.

    Args:
        half: What stands under "after" in `{task}_evaluation.json`.
        rows: The rows of its predictions.

    Returns:
        Several lines, long texts shortened; "" where nothing was chosen.
    """
    chosen = half.get("examples")
    if not chosen:
        return ""
    by_id = {row["id"]: row for row in rows}
    lines = [f"examples: {chosen['note']}"]
    for kind, title in KINDS.items():
        for entry in chosen[kind][:NUM_PRINTED]:
            row = by_id[entry["id"]]
            told = describe_entry(chosen, entry)
            lines += ["", f"{title.lower()}: {entry['id']}" + (f", {told}" if told else "")]
            lines.append(_line("prompt", row["prompt"]))
            references = row["references"]
            more = f" (and {len(references) - 1} more)" if len(references) > 1 else ""
            lines += [_line("reference", references[0], after=more)] if references else []
            lines.append(_line("answer", row["prediction"]))
    return "\n".join(lines)


def _line(name: str, text: str, *, after: str = "") -> str:
    """One text on one line, its middle left out where it is too long."""
    flat = " ".join(text.split()) or "(nothing)"
    room = terminal_width() - _MARGIN - len(after)
    if len(flat) > room:
        half = (room - 5) // 2
        flat = f"{flat[:half].rstrip()} ... {flat[-half:].lstrip()}"
    return f"{textwrap.indent(name, '  '):<{_MARGIN}}{flat}{after}"
