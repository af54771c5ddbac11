"""What the HTML pages are put together from; each page is one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import Plot

__all__ = ["count", "figure_grid", "number", "page", "table"]

CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --page: #fbfbf9; --card: #fff;
  --rule: #d9dde3; --mark: #2f6fb3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --page: #14181e;
  --card: #1b2027; --rule: #39414d; --mark: #7db4ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.scroll + p { font-size: .88rem; margin-top: .6rem; }
.note { border-left: 3px solid var(--mark); padding: .2rem .8rem; margin: 1rem 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .82rem;
  border-bottom: 1px solid var(--rule); }
tr + tr td { border-top: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
td:first-child { font-weight: 600; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; margin: 0 auto; }
svg text { font-family: inherit !important; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem;
  margin: 0; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1rem; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
"""


def page(title: str, subtitle: str, results: Mapping[str, Any], *parts: str) -> str:
    """A page of HTML ``parts``, and where they come from: what :func:`provenance` and the config in
    ``results`` say."""
    machine = results["machine"]
    facts = {
        "Command": results["command"],
        "Versions": f"svdalign {results['svdalign']}, torch {results['torch']}, "
        f"Python {results['python']}",
        "Commit": results["git"] or "not run from a checkout",
        "Machine": f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}, "
        f"device: {machine['device']}, {machine['system']}",
    }
    facts_html = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    settings = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>"
        for k, v in results["config"].items()
    )
    note = {
        "interrupted": "Interrupted: this is what was measured until then.",
        "diverged": "Stopped: the training loss or the weights were no longer finite.",
    }.get(results["status"])
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="soft">{html.escape(subtitle)}</p>',
            f'<p class="note">{note}</p>' if note else "",
            *parts,
            "<h2>Where these numbers come from</h2>",
            f"<dl>{facts_html}</dl>",
            f"<details><summary>All settings</summary><dl>{settings}</dl></details>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} – svdalign</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain text under ``headings``; scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def figure_grid(figures: Sequence[tuple[Plot, str]]) -> str:
    """Figures with their captions, side by side where there is room."""
    return (
        '<div class="figures">'
        + "".join(
            f"<figure>{plot.svg()}<figcaption>{text}</figcaption></figure>"
            for plot, text in figures
        )
        + "</div>"
    )


def number(value: float | None, form: str) -> str:
    """``value`` in the given format; a dash where it is missing."""
    return "–" if value is None else form.format(value)


def count(value: float) -> str:
    """A large number with three digits and k, M, G or T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"
