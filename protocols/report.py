"""A self-contained HTML page: tables, and figures as base64. No script, no address elsewhere."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from protocols.scores import cell_text

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dce0, #3a4048); --soft: light-dark(#5b6570, #9aa4b0); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p.note, figcaption, caption { color: var(--soft); font-size: .88rem; text-align: left; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; white-space: nowrap; }
th:first-child, td:first-child { background: Canvas; left: 0; position: sticky; }
th { font-weight: 600; } code { overflow-wrap: anywhere; font-size: .88rem; }
figure { margin: 1rem 0; } img { background: #fff; border-radius: 4px; height: auto; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A page of sections: (heading, parts made by the functions below)."""
    body = "\n".join(f"<section><h2>{html.escape(heading)}</h2>\n" + "\n".join(parts) + "</section>"
                     for heading, parts in sections if parts)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n")


def table(rows: Sequence[Mapping]) -> str:
    """Rows of one set of columns; {"value", "interval"} becomes `value [low, high]`."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell_text(cell))}</td>" for cell in row.values()) + "</tr>"
                      for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def facts(values: Mapping) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>"
                            for k, v in values.items()) + "</dl>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def figure(path: str | os.PathLike, caption: str) -> str:
    """A PNG file, embedded in the page."""
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    text = html.escape(caption)
    return (f'<figure><img src="data:image/png;base64,{encoded}" alt="{text}"><figcaption>{text}</figcaption>'
            "</figure>")
