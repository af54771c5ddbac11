"""Small tables of plain text, for terminals and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

_Rows = Sequence[Sequence[str]]  #: the first one holds the headings


def as_text(rows: _Rows) -> str:
    """Columns set to the left, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_html(rows: _Rows, lead: str = "") -> str:
    """The same for a notebook; ``lead``: lines above it."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    head, *body = rows
    above = f"<pre>{html.escape(lead)}</pre>" if lead else ""
    lines = "".join(line(row, "td") for row in body)
    return f"{above}<table><thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"
