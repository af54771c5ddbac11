"""A page is one HTML file, made from a template; all text in it is escaped.

A page needs no network. Its policy allows no script but its own and no source from elsewhere, so
that nothing that comes in with a result, such as the name of a data set, can do anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .plots import Plot, Style


@dataclass(frozen=True)
class Table:
    """Rows of plain text under headings. ``keyed``: each row is a method of the page's key."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    keyed: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot with its caption. ``method``: if it shows a single method, that one's index in the
    page's key."""

    plot: Plot
    caption: str
    method: int | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page, from top to bottom."""

    heading: str
    text: Sequence[str] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = field(default=())


def page(
    title: str,
    subtitle: str,
    results: Mapping[str, Any],
    sections: Sequence[Section],
    *,
    key: Sequence[str] = (),
) -> str:
    """The HTML of a page. Its footer has the provenance and the config that are in ``results``.
    ``key``: labels of the methods, in the order of keyed plots and tables."""
    machine = results["machine"]
    script, css = _read("filter.js"), _read("page.css")
    return environment().get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        note={
            "interrupted": "Interrupted: this is what was measured until then.",
            "diverged": "Stopped: the training loss or the weights were no longer finite.",
        }.get(results["status"]),
        key=[(label, Style(i)) for i, label in enumerate(key)],
        sections=sections,
        facts={
            "Command": results["command"],
            "Versions": f"svdalign {results['svdalign']}, torch {results['torch']}, "
            f"Python {results['python']}",
            "Commit": results["git"] or "not run from a checkout",
            "Machine": f"{machine['cpu']}, cores: {machine['cores']}, threads: "
            f"{machine['threads']}, device: {machine['device']}, {machine['system']}",
        },
        settings=results["config"],
        css=css,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src '{_digest(script)}'",
    )  # fmt: skip


def number(value: float | None, form: str) -> str:
    """``value`` in the given format; a dash where it is missing."""
    return "–" if value is None else form.format(value)


def count(value: float) -> str:
    """A large number with three digits and k, M, G or T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


@cache
def environment() -> Environment:
    """The environment of the templates. Pages escape all text, Markdown only what passes the filter
    ``text``."""
    found = Environment(
        loader=PackageLoader(__package__),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["text"] = plain
    return found


def plain(text: str) -> str:
    """``text`` in Markdown, where it is neither HTML nor the end of a table's cell."""
    return html.escape(text, quote=False).replace("|", "&#124;")


def _read(name: str) -> Markup:
    """The text of a file of this package, which goes into the page unchanged."""
    templates = environment()
    assert templates.loader is not None
    return Markup(templates.loader.get_source(templates, name)[0])


def _digest(script: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
