"""The page of an evaluation that belongs to no run: its scores, and examples best, worst and random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from peftlab.files import write_text
from peftlab.report.answers import answer_section
from peftlab.report.page import render_page
from peftlab.report.score_table import score_section

EVALUATION_PAGE = "evaluation.html"


def write_evaluation_page(
    result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path, *, title: str
) -> Path:
    """Write the page of an evaluation.

    Args:
        result: The content of `{task}_evaluation.json`.
        rows: The rows of its predictions.
        folder: Where the page goes.
        title: What was scored.

    Returns:
        `evaluation.html` in the folder: one file that needs nothing else.

    Raises:
        OutputError: It cannot be written.
    """
    half = result["after"]
    sections = [
        score_section(result, trained=False),
        answer_section(half.get("examples"), {"after": rows}, trained=False),
    ]
    lead = f"<p>{escape(str(result['task']))}, split {escape(str(result['split']))}</p>"
    return write_text(folder / EVALUATION_PAGE, render_page(title, lead, sections))
