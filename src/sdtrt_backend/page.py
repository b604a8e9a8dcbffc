"""Pages of HTML that need no other file: tables that can be sorted and filtered, pictures, light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#ddd;--soft:#666}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#181a1b;--line:#3a3d40;--soft:#999}img{background:#fff}}
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:82rem;padding:0 1rem;color:var(--ink);background:var(--paper)}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.wide{overflow-x:auto}img{max-width:100%}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
p,li{max-width:60rem}.soft{color:var(--soft)}
input{font:inherit;padding:.2rem .5rem;width:min(24rem,100%);box-sizing:border-box}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
@media(max-width:600px){body{margin:1rem auto}td,th{padding-right:.5rem}}
"""
# numbers by their value, all else as text with the numbers in it by theirs; empty cells come last, whichever way
SCRIPT = """
for (const table of document.querySelectorAll("table.sorted")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].textContent;
  const before = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  heads.forEach((head, i) => head.querySelector("button").onclick = () => {
    const down = head.ariaSort === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = down ? "descending" : "ascending";
    rows.sort((a, b) => {
      const [x, y] = [value(a, i), value(b, i)], empty = (x === "") - (y === "");
      return empty || (down ? -1 : 1) * before(x, y);
    });
    body.append(...rows);
  });
  const filter = document.querySelector(`input[data-of=${table.id}]`), count = filter.nextElementSibling;
  filter.oninput = () => {
    const words = filter.value.toLowerCase().split(/ +/);
    rows.forEach(row => row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word)));
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
  };
  filter.oninput();
}
"""


def page(title: str, body: str) -> str:
    """The whole of it. body: HTML."""
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>{body}"
            f"<script>{SCRIPT}</script></html>\n")


def heading(text: str) -> str:
    """Of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def picture(title: str, text: str, image: Image.Image) -> str:
    """A section with a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return (f'{heading(title)}<p>{html.escape(text)}</p><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are flush right."""
    return f'<div class="wide"><table>{_rows([html.escape(one) for one in head], rows)}</table></div>'


def sorted_table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same, with a field to filter it by words and buttons to sort it by a column. name: of a letter and letters."""
    buttons = [f'<button type="button">{html.escape(one)}</button>' for one in head]
    return (f'<input type="search" data-of="{name}" placeholder="words to filter by" aria-label="words to filter by"> '
            f'<span class="soft"></span><div class="wide"><table class="sorted" id="{name}">{_rows(buttons, rows)}'
            "</table></div>")


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """head: HTML of its cells; rows: texts."""
    numbers = [all(row[i] == "" or _is_number(row[i]) for row in rows) and any(row[i] for row in rows) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if number else "" for number in numbers]
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"

    lines = "".join(line("td", [html.escape(cell) for cell in row]) for row in rows)
    return f"<thead>{line('th', head)}</thead><tbody>{lines}</tbody>"


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("x").removesuffix("%"))
    except ValueError:
        return False
    return True
