"""Parts of an HTML page that stands alone: sections, tables, bars, pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --bar: #3b6ea5; --mark: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --bar: #7fb0e6; --mark: #ff8a75; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
nav a { display: inline-block; margin-right: 1rem; }
.kind { font-size: .8rem; font-weight: 600; letter-spacing: .05em; border: 1px solid; border-radius: .3rem; padding: 0 .4rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--soft); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: .3rem; }
figcaption { font-size: .85rem; }
.bars { display: grid; grid-template-columns: minmax(8rem, auto) 1fr auto; gap: .25rem .6rem; align-items: center; font-size: .85rem; }
.track { position: relative; height: .9rem; background: var(--soft); border-radius: .2rem; }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--bar); border-radius: .2rem; }
.mark { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: var(--mark); }
.absent { border-left: 3px solid var(--mark); padding-left: .6rem; }
"""


class Bar(NamedTuple):
    """A horizontal bar: what it is of, its length, and marks on its track; all in one unit."""

    name: str
    value: float
    marks: Sequence[float]
    text: str


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """sections: (id, heading, HTML)."""
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>' for name, heading, html in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{paragraph(lead)}<nav>{links}</nav>{body}</body></html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def kind(word: str, text: str) -> str:
    """How what follows was found: one word, and a sentence."""
    return f'<p><span class="kind">{escape(word)}</span> {escape(text)}</p>'


def absent(name: str, how: str) -> str:
    return f'<p class="absent">{escape(name)} is not there. It is made by: <code>{escape(how)}</code></p>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def bars(entries: Sequence[Bar]) -> str:
    """All on one scale. What a mark is, the text around them says."""
    longest = max(max((entry.value, *entry.marks)) for entry in entries)
    lines = []
    for entry in entries:
        marks = "".join(f'<span class="mark" style="left:{100 * mark / longest:.1f}%"></span>' for mark in entry.marks)
        bar = f'<span class="bar" style="width:{100 * entry.value / longest:.1f}%"></span>'
        lines.append(f'<span>{escape(entry.name)}</span><span class="track">{bar}{marks}</span><span>{escape(entry.text)}</span>')
    return f'<div class="bars">{"".join(lines)}</div>'


def picture(path: Path, caption: str) -> str:
    """An SVG or PNG file, inside the page."""
    types = {".svg": "image/svg+xml", ".png": "image/png"}
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:{types[path.suffix]};base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
