"""The parts of a page: its frame, tables, paragraphs and pictures. Text is escaped here and nowhere else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5a6a7a; --line: #d5dde5; --paper: #ffffff; --band: #f3f6f9;
  --bad: #b3261e; --good: #1e6b3a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --soft: #9aa8b6; --line: #37434f; --paper: #14191f; --band: #1c232b;
    --bad: #ff8a80; --good: #7fd39b }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.35rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem } p { margin: .4rem 0 }
.verdict { font-weight: 600 } .bad { color: var(--bad) } .good { color: var(--good) } .soft { color: var(--soft); font-size: .87rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.number, th.number { text-align: right; white-space: nowrap }
tr.marked { background: var(--band) }
tr.marked td:first-child { font-weight: 600 } code { font-family: ui-monospace, monospace } img { max-width: 100%; height: auto }
""".strip()


@dataclass(frozen=True)
class Marked:
    """Text of a table that stands out."""

    text: str
    bad: bool = True


Cell = str | Marked


def page(title: str, verdict: str, well: bool, parts: Iterable[str]) -> str:
    """A whole document. Its policy forbids scripts and every address but those inside it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>",
    ]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="verdict {"good" if well else "bad"}">{escape(verdict)}</p>', *parts]
    return "\n".join(['<!doctype html>\n<html lang="en">\n<head>', *head, "</head>\n<body>", *body, "</body>\n</html>\n"])


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def lines(sentences: Iterable[str]) -> str:
    """Small print."""
    return "\n".join(f'<p class="soft">{escape(sentence)}</p>' for sentence in sentences)


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, words: Iterable[int] = (0,), marked: Iterable[int] = ()) -> str:
    """A table; `words` are the columns that are not numbers, `marked` the rows that stand out. A short row's last cell takes the rest."""
    left, first = set(words), set(marked)
    kinds = ["" if column in left else ' class="number"' for column in range(len(head))]
    out = [
        '<div class="wide"><table>',
        "<tr>" + "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True)) + "</tr>",
    ]
    for index, row in enumerate(rows):
        cells = [_cell(cell, kinds[column]) for column, cell in enumerate(row)]
        if 0 < len(row) < len(head):
            cells[-1] = _cell(row[-1], f' colspan="{len(head) - len(row) + 1}"')
        out.append(f"<tr{' class=' + chr(34) + 'marked' + chr(34) if index in first else ''}>{''.join(cells)}</tr>")
    return "\n".join([*out, "</table></div>"])


def picture(svg: str, about: str) -> str:
    """An SVG as an image inside the page, with words for those who do not see it."""
    data = b64encode(svg.encode()).decode()
    return f'<p><img alt="{escape(about)}" src="data:image/svg+xml;base64,{data}"></p>'


def _cell(cell: Cell, kind: str) -> str:
    if isinstance(cell, Marked):
        return f'<td{kind}><span class="{"bad" if cell.bad else "good"}">{escape(cell.text)}</span></td>'
    return f"<td{kind}>{escape(cell)}</td>"
