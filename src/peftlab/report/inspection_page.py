"""The page of an inspected model, and the page that puts two side by side. Read from the folder alone; no torch."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from peftlab.files import write_text
from peftlab.report.before_after import BEFORE_AFTER, BEFORE_AFTER_PAGE, write_before_after_page
from peftlab.report.inspection_comparison import PAIR_SECTIONS, InspectedPair
from peftlab.report.inspection_folder import COMPARISON, INSPECTION, PAGE, InspectionFolder, read_document
from peftlab.report.inspection_sections import SECTIONS
from peftlab.report.page import Section, render_page

__all__ = ["COMPARISON", "INSPECTION", "PAGE", "write_inspection_page"]


def write_inspection_page(folder: str | Path) -> Path:
    """Draw the charts of an inspection and write its page.

    Args:
        folder: A folder that `peftlab inspect` made, of one model or of two.

    Returns:
        `inspection.html` in the folder: one file that needs nothing else. Of a run, `before_after.html` is beside it.

    Raises:
        DataError: The folder holds no inspection.
        RunError: A file is damaged; names it.
        OutputError: The page or a chart cannot be written.
    """
    path = Path(folder)
    if (path / COMPARISON).is_file():
        parts = [InspectionFolder(path / name) for name in ("a", "b")]
        pair = InspectedPair(path, read_document(path / COMPARISON), parts[0], parts[1])
        title = f"{pair.labels[0]} and {pair.labels[1]}"
        sections = _made([lambda make=make: make(pair) for make in PAIR_SECTIONS])  # type: ignore[misc]
        return write_text(path / PAGE, render_page(title, _pair_lead(pair), sections))
    if (path / BEFORE_AFTER).is_file():
        write_before_after_page(path)
    one = InspectionFolder(path)
    sections = _made([lambda make=make: make(one) for make in SECTIONS])  # type: ignore[misc]
    return write_text(path / PAGE, render_page(str(one.document["name"]), _lead(one), sections))


def _made(makers: list[Callable[[], Section | None]]) -> list[Section]:
    """The sections that apply."""
    return [section for section in (make() for make in makers) if section is not None]


def _lead(one: InspectionFolder) -> str:
    """What is looked into."""
    document = one.document
    facts, adapter = document["facts"], document["adapter"]
    words = [str(facts["class"]), str(facts["shape"])]
    if adapter:
        words.insert(0, f"{adapter['method']} on {adapter['base']['name']}, task {adapter['task']}")
    changed = ""
    if (one.path / BEFORE_AFTER_PAGE).is_file():
        changed = f'<p><a href="{BEFORE_AFTER_PAGE}">Before and after: what fine-tuning changed</a></p>'
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"<p>{escape(' · '.join(words))}</p>{changed}"
        f'<p class="muted">Looked into as “{escape(str(document["reference"]))}” on {escape(document["created"][:10])}'
        f" with {escape(versions)}.</p>"
    )


def _pair_lead(pair: InspectedPair) -> str:
    """What is compared."""
    rows = (
        f"<b>{escape(label)}</b> {escape(str(part.document['facts']['class']))}"
        for label, part in zip(pair.labels, pair.parts, strict=True)
    )
    return f"<p>{' &nbsp;·&nbsp; '.join(rows)}</p>"
