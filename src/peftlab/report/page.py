"""One self-contained HTML page: no script, nothing from the network, light and dark, prints well."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--muted:#656d76;--line:#d8dee4;--ground:#fff;--soft:#f6f8fa;
--accent:#0072b2;--warm:#d55e00}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--muted:#9198a1;--line:#30363d;--ground:#0d1117;--soft:#161b22;
--accent:#58a6e0;--warm:#f0883e}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:40px 24px 80px}
header{border-bottom:1px solid var(--line);padding-bottom:20px;margin-bottom:8px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:44px 0 12px;padding-top:4px}
h3{font-size:15px;margin:22px 0 8px}
p{margin:8px 0;max-width:76ch;overflow-wrap:anywhere}
.muted,.absent,caption,figcaption{color:var(--muted)}
.absent{border:1px dashed var(--line);border-radius:8px;padding:12px 16px;max-width:none}
nav{margin-top:14px;font-size:13px;display:flex;flex-wrap:wrap;gap:4px 16px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0}
.tile{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:19px;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}
.tile span{color:var(--muted);font-size:12.5px}
.scroll{overflow-x:auto;margin:10px 0}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:50%}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:600;font-size:12.5px;white-space:nowrap}
td:last-child,th:last-child{padding-right:0}
caption{text-align:left;padding-bottom:6px;font-size:13px}
.wide td{overflow-wrap:anywhere;min-width:9em}
figure{margin:14px 0}
figure img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:8px}
svg.span{display:block;color:var(--ink)}
.example{border:1px solid var(--line);border-radius:8px;margin:12px 0;overflow:hidden;break-inside:avoid}
.example>div{display:grid;grid-template-columns:104px 1fr;gap:12px;padding:8px 14px;border-bottom:1px solid var(--line)}
.example>div:last-child{border-bottom:0}
.example .k{color:var(--muted);font-size:12.5px;padding-top:2px}
.example .v{white-space:pre-wrap;overflow-wrap:anywhere}
.example .after{background:var(--soft)}
.example .muted{font-size:12.5px}.example details{margin:2px 0 0}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:14px 16px;overflow-x:auto;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{margin:10px 0}summary{cursor:pointer;color:var(--accent)}
.status{display:inline-block;font-size:12.5px;border:1px solid currentColor;border-radius:99px;padding:1px 10px;
color:var(--accent)}
.status.open{color:var(--warm)}
@media print{:root{--ink:#000;--muted:#444;--line:#bbb;--ground:#fff;--soft:#f5f5f5;--accent:#000}
body{font-size:11pt}main{max-width:none;padding:0}nav{display:none}section,figure,tr{break-inside:avoid}
h2{break-after:avoid}pre{white-space:pre-wrap}}
@media (max-width:600px){.example>div{grid-template-columns:1fr;gap:2px}main{padding:24px 16px}}
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a page.

    Attributes:
        title: Its heading.
        html: Its content.
    """

    title: str
    html: str


def absent(text: str) -> str:
    """A paragraph in place of something that is not there yet.

    Args:
        text: What, and when it comes.

    Returns:
        HTML.
    """
    return f'<p class="absent">Not there yet: {escape(text)}</p>'


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Numbers in boxes.

    Args:
        facts: Name and value of each.

    Returns:
        HTML.
    """
    boxes = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in facts
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def picture(path: Path, description: str) -> str:
    """A PNG inside the page.

    Args:
        path: The file.
        description: For readers who do not see it.

    Returns:
        HTML.
    """
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{content}"></figure>'


def scrolling(table: str, *, wide: bool = False) -> str:
    """A table that scrolls in itself where the page is narrow.

    Args:
        table: A `<table>`.
        wide: Whether long words in cells may break.

    Returns:
        HTML.
    """
    return f'<div class="scroll{" wide" if wide else ""}">{table}</div>'


def render_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: Its title.
        lead: HTML under the title.
        sections: Its parts, in order.

    Returns:
        HTML.
    """
    links = "".join(
        f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>' for section in sections
    )
    parts = "".join(
        f'<section id="{_anchor(s.title)}"><h2>{escape(s.title)}</h2>{s.html}</section>' for s in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{lead}<nav>{links}</nav></header>{parts}</main></body></html>\n"
    )


def _anchor(title: str) -> str:
    """A section's place in the page's address."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())
