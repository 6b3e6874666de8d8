"""Pieces of a page: one file, no script, nothing fetched, every text escaped here.

What is called ``text`` is escaped; what is called ``markup`` is taken as it is.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape


def document(title: str, sections: Sequence[str], broad: bool = False) -> str:
    """A whole page.

    Args:
        title: text, of the browser's tab.
        sections: markup.
        broad: give tables and charts a wider column on a wide screen.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon of its own a browser would ask for one, and log that there is none.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<main{' class=broad' if broad else ''}>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, markup: str, name: str = "") -> str:
    """A part of the page under a title; ``name`` can be linked to."""
    anchor = f' id="{escape(name)}"' if name else ""
    return f"<section{anchor}><h2>{escape(title)}</h2>\n{markup}</section>"


def picture(png: bytes, alt: str) -> str:
    """A chart as wide as its column."""
    return f'<img class="plot" alt="{escape(alt)}" src="{uri(png)}">'


def uri(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def thumbnail(png: bytes, caption: str, kind: str = "", alt: str | None = None) -> str:
    """A small picture with a caption; ``kind`` is ``query``, ``same`` or ``unlike``."""
    mark = "✗ " if kind == "unlike" else ""
    named = f' class="{escape(kind)}"' if kind else ""
    return (
        f"<figure{named}>"
        f'<img alt="{escape(caption if alt is None else alt)}" src="{uri(png)}">'
        f"<figcaption>{mark}{escape(caption)}</figcaption></figure>"
    )


def strip(figures: Sequence[str], kind: str = "") -> str:
    """Thumbnails (markup) in a row; of the kind ``maps`` they keep their size and wrap."""
    return f'<div class="{escape(f"strip {kind}".strip())}">{"".join(figures)}</div>'


def header(text: str, note: str = "", kind: str = "") -> str:
    """The header of a column, with a small note below it."""
    named = f' class="{escape(kind)}"' if kind else ""
    small = f'<br><span class="small">{escape(note)}</span>' if note else ""
    return f'<th scope="col"{named}>{escape(text)}{small}</th>'


def row(text: str, cells: Sequence[str], note: str = "", kind: str = "") -> str:
    """A row of a table: its header, a small note below it, and cells (markup, whole ``<td>``)."""
    named = f' class="{escape(kind)}"' if kind else ""
    small = f'<br><span class="small">{escape(note)}</span>' if note else ""
    return f'<tr{named}><th scope="row">{escape(text)}{small}</th>{"".join(cells)}</tr>'


def cell(text: str, notes: Sequence[str] = (), kind: str = "") -> str:
    """A cell with a text and small notes (texts) below it."""
    named = f' class="{escape(kind)}"' if kind else ""
    small = "".join(f'<br><span class="small">{escape(note)}</span>' for note in notes)
    return f"<td{named}>{escape(text)}{small}</td>"


def table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        head: markup of the column headers (:func:`header`); empty for a table without.
        rows: markup, each a whole ``<tr>`` (:func:`row`).
        kind: class of the table.
    """
    top = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    named = f' class="{escape(kind)}"' if kind else ""
    # Focusable, so that it can be scrolled with the keyboard.
    return (
        f'<div class="wide" tabindex="0"><table{named}>{top}<tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )


def facts(lines: Mapping[str, str]) -> str:
    """A table of name and value, both texts."""
    return table((), [row(key, [cell(value)]) for key, value in lines.items()], "facts")


def signed(difference: float) -> str:
    """A difference of shares in 0–1 as points with a sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    """``[−1.2, +3.4]`` of a difference of shares."""
    return f"[{signed(low)}, {signed(high)}]"


_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:16px/1.5 system-ui,sans-serif}
main{max-width:44rem;margin:0 auto;padding:1rem}main.broad{max-width:66rem}
h1{font-size:1.5rem;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem;border-top:1px solid #d9dee4;padding-top:1rem;
overflow-wrap:anywhere}
h3{font-size:1rem;margin:1rem 0 .25rem;overflow-wrap:anywhere}
p{margin:.4rem 0;overflow-wrap:anywhere}main.broad p{max-width:44rem}
.small{font-size:.82rem;color:#52606d}
.cards{display:flex;flex-wrap:wrap;gap:.75rem;margin-top:1rem}
.card{flex:1 1 16rem;border:1px solid #d9dee4;border-radius:.5rem;padding:.75rem 1rem}
.big{font-size:2rem;line-height:1.1;font-weight:650;color:#1565c0}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.35rem .5rem;border-bottom:1px solid #e8ecf0;text-align:right;vertical-align:top}
th:first-child{text-align:left;font-weight:500}thead th{font-weight:600;vertical-align:bottom}
tr.student{background:#eef5fc}tr.student th{font-weight:650}
td.student,th.student{background:#eef5fc}td.best{font-weight:650}
td .small{white-space:nowrap;font-weight:400}th .small{font-weight:400}
tbody th,thead th{overflow-wrap:break-word;min-width:5.5rem}
.makers td{text-align:left;overflow-wrap:anywhere;min-width:6rem}.makers th{text-align:left}
.facts td{text-align:left;overflow-wrap:anywhere}.facts th{white-space:nowrap}
.stuck th:first-child{position:sticky;left:0;background:#fff}
.plot{width:100%;max-width:34rem;height:auto;margin:.75rem 0;display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 1.5rem}
.pair>*{min-width:0}
.strip{display:flex;gap:.3rem;margin:.4rem 0}
figure{margin:0;flex:1 1 0;min-width:0;max-width:5.5rem}
figure img{width:100%;display:block;image-rendering:pixelated;border:3px solid #d9dee4}
figure.query{margin-right:.5rem}figure.query img{border-color:#1565c0}
figure.unlike img{border-color:#c62828}
figcaption{font-size:.7rem;line-height:1.2;text-align:center;overflow-wrap:anywhere}
.maps{flex-wrap:wrap}.maps figure{flex:0 0 5.5rem}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
nav{margin:.75rem 0;display:flex;flex-wrap:wrap;gap:.25rem .9rem;font-size:.92rem}
nav a{color:#1565c0;overflow-wrap:anywhere}
.above{color:#1b5e20}.below{color:#b71c1c}
"""
