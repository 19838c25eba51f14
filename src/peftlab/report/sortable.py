"""A table that a click on a heading sorts; without script it is a table in the order it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_SCRIPT = """<script>
document.querySelectorAll("table.sortable th").forEach(function(head){
 var button=head.querySelector("button"); if(!button) return;
 button.addEventListener("click",function(){
  var table=head.closest("table"),body=table.tBodies[0],place=head.cellIndex;
  var down=head.getAttribute("aria-sort")==="ascending";
  table.querySelectorAll("th").forEach(function(other){other.removeAttribute("aria-sort")});
  head.setAttribute("aria-sort",down?"descending":"ascending");
  Array.from(body.rows).sort(function(a,b){
   var x=a.cells[place].dataset.key,y=b.cells[place].dataset.key;
   if(x===""||y==="") return (x==="")-(y==="");
   var order=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;
   return down?-order:order;
  }).forEach(function(row){body.appendChild(row)});
 });
});
</script>"""
_STYLE = (
    "<style>table.sortable th button{all:unset;cursor:pointer}table.sortable th button:focus-visible"
    "{outline:2px solid var(--accent)}table.sortable th[aria-sort=ascending] button::after{content:' \\2191'}"
    "table.sortable th[aria-sort=descending] button::after{content:' \\2193'}</style>"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: What stands in it.
        key: What it is sorted by; the text where None. Cells without a value, key "", come last.
        link: Where it leads, or None.
    """

    text: str
    key: float | str | None = None
    link: str | None = None


def sortable_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table whose headings sort it.

    Args:
        header: The headings.
        rows: As many cells in each as there are headings.

    Returns:
        HTML with its own style and script; nothing is loaded.
    """
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    table = f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'{_STYLE}<div class="scroll">{table}</div>{_SCRIPT}'


def _cell(cell: Cell) -> str:
    """One cell."""
    key = cell.text if cell.key is None else cell.key
    text = escape(cell.text)
    inner = f'<a href="{escape(cell.link)}">{text}</a>' if cell.link else text
    return f'<td data-key="{escape(str(key))}">{inner}</td>'
