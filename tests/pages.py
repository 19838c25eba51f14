"""Checks of the pages that peftlab writes: well-formed, self-contained, nothing fetched or run."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path


class _Checker(HTMLParser):
    """Elements are closed in order; nothing is fetched or run."""

    def __init__(self, *, sortable: bool) -> None:
        super().__init__()
        self.refused = ("link", "iframe", *(() if sortable else ("script",)))
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in self.refused
        self.sources += [value or "" for name, value in attrs if name == "src"]


def check_page(path: Path, *, sortable: bool = False) -> str:
    """The page, after it was checked.

    Args:
        path: Its file.
        sortable: Whether it has a table to sort, and with it the one script that does so.

    Returns:
        Its HTML.
    """
    page = path.read_text(encoding="utf-8")
    checker = _Checker(sortable=sortable)
    checker.feed(page)
    assert checker.open == []
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert "url(" not in page
    assert page.count("<script>") == int(sortable)
    return page
