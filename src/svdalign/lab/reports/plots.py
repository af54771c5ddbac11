"""Figures: inline SVG in the page's own colours, for light and dark, or files.

Every function returns a :class:`Plot`. What is drawn comes as a mapping from a label to its data;
a label's place in the mapping decides its colour, so that it has the same one in all figures that
name the same labels in the same order. A label without data keeps its place and is not drawn.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Seeds = Sequence[Sequence[tuple[float, float | None]]]
"""For each seed, its points ``(x, y)``; ``None`` where a value is missing or not finite."""

COLOURS = (
    *("#4c86c6", "#e07b39", "#3f9e6e", "#c9507c", "#8a6fd1"),
    *("#b0902c", "#2fa3ad", "#9a6a4f", "#7f8893"),
)
_PART_COLOURS = ("#b0902c", "#e07b39", "#3f9e6e", "#4c86c6")
_DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))
_MARKERS = "osD^vP*Xh"
_INK, _RULE = "#010203", "#040506"  # stand-ins that the page's own colours replace
_FILE_COLOURS = {_INK: "#1c2430", _RULE: "#c5cbd3"}
_SIZE = (4.2, 2.9)  #: inches
_LABEL = 26  #: characters of a label on one line, and three lines of it at most
CELLS = 12  #: columns of a heat map up to which values are written into its cells

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "svdalign",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Style:
    """Colour and style of the label with this index."""

    index: int

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def dashes(self) -> tuple[float, ...]:
        return _DASHES[self.index % len(_DASHES)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.index % len(_MARKERS)]


@dataclass(frozen=True)
class Plot:
    """A figure yet to be drawn.

    ``alt``: what it shows, in words, for screen readers. ``keyed``: its labels are those of the
    page's key, which stands in for a legend; each label's parts are marked with its place
    (``data-method``), so that the page can hide them.
    """

    alt: str
    draw: Callable[[SubFigure | Figure, bool], None]
    size: tuple[float, float] = _SIZE
    keyed: bool = False

    def svg(self) -> Markup:
        """SVG for a page, in the page's colours of text and lines."""
        svg = _render([self], "svg", _STYLE, legend=not self.keyed).decode("utf-8")
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
        svg = re.sub(r'id="label(\d+)"', r'data-method="\1"' if self.keyed else "", svg)
        svg = re.sub(r'<g id="[\w.-]+"', "<g", svg)  # on a page they would not be unique
        svg = svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
        alt = escape(self.alt)
        return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1))

    def save(self, stem: Path) -> None:
        """Write ``stem.svg`` and ``stem.png``, dark on white."""
        for kind in ("svg", "png"):
            save([self], stem.with_suffix(f".{kind}"))


def save(plots: Sequence[Plot], path: Path) -> None:
    """Write ``plots``, side by side, into one file, dark on white; its suffix says of what kind."""
    style = {k: _FILE_COLOURS.get(v, v) if isinstance(v, str) else v for k, v in _STYLE.items()}
    path.write_bytes(_render(plots, path.suffix[1:], style, legend=True))


def curves(
    data: Mapping[str, Seeds],
    x: str,
    y: str,
    *,
    limits: tuple[float, float] | None = None,
    lines: Mapping[str, float] | None = None,
    whole: bool = False,
    log: bool = False,
    keyed: bool = False,
) -> Plot:
    """A line for each label: the mean over its seeds, the range between them shaded.

    ``limits``: of y. ``lines``: values of y to mark by a horizontal line, by name. ``whole``: ticks
    of x are whole numbers. ``log``: y on a logarithmic scale.
    """
    means = {label: _mean_curve(seeds) for label, seeds in data.items()}

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for index, (label, points) in enumerate(means.items()):
            if points:
                style = Style(index)
                at, mean, low, high = zip(*points, strict=True)
                line = axes.plot(
                    at, mean, label=_shorten(label), color=style.colour, dashes=style.dashes,
                    marker="o" if len(points) <= 40 else None, markersize=3,
                )  # fmt: skip
                _mark(index, *line)
                if len(data[label]) > 1:
                    band = axes.fill_between(
                        at, low, high, color=style.colour, alpha=0.18, linewidth=0
                    )
                    _mark(index, band)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.03)
        axes.set(xlabel=x, ylabel=y)
        if log:
            _scale_logarithmically(axes)
        if limits:
            axes.set_ylim(limits)
        _across(axes, lines or {})

    last = {label: points[-1][1] for label, points in means.items() if points}
    alt = f"{y} by {x}; last values: {_in_words(last)}"
    legend = 0.0 if keyed or len(last) < 2 else 0.17 * math.ceil(len(last) / 2)  # two columns of it
    return Plot(alt, _on_axes(draw), size=(_SIZE[0], _SIZE[1] + legend), keyed=keyed)


def scatter(
    data: Mapping[str, tuple[float, float, float | None] | None],
    x: str,
    y: str,
    *,
    limits: tuple[float, float] | None = None,
    lines: Mapping[str, float] | None = None,
    styles: Callable[[str], Mapping[str, Any]] = lambda label: {},
    keyed: bool = False,
) -> Plot:
    """A point ``(x, y, spread of y or None)`` for each label, which stands beside it.

    ``styles``: arguments of matplotlib's ``errorbar`` for the points of single labels.
    """
    points = {label: point for label, point in data.items() if point is not None}

    def draw(axes: Axes) -> None:
        for index, (label, point) in enumerate(data.items()):
            if point is not None:
                style = Style(index)
                look = {"fmt": style.marker, "color": style.colour, **styles(label)}
                drawn = axes.errorbar(*point, markersize=6, elinewidth=1, **look)
                _mark(index, *drawn.get_children())
        axes.margins(0.12)
        axes.set_xlim(left=0)
        axes.set(xlabel=x, ylabel=y)
        if limits:
            axes.set_ylim(limits)
        low, high = axes.get_ylim()
        width = axes.get_xlim()[1]
        heights = _apart({label: point[1] for label, point in points.items()}, low, high)
        for index, label in enumerate(data):
            if label in points:
                at = points[label][0]
                right = at > 0.55 * width
                beside = at + (-0.03 if right else 0.03) * width
                text = axes.annotate(
                    _shorten(label), (at, points[label][1]), (beside, heights[label]), fontsize=8,
                    ha="right" if right else "left", va="center",
                    arrowprops={"arrowstyle": "-", "color": matplotlib.rcParams["grid.color"],
                                "linewidth": 0.8, "shrinkB": 5},
                )  # fmt: skip
                _mark(index, text, text.arrow_patch)
        _across(axes, {name: at for name, at in (lines or {}).items() if low <= at <= high})

    named = [f"{label} {point[1]:.3g} at {point[0]:.3g}" for label, point in points.items()]
    return Plot(f"{y} against {x}: {', '.join(named)}", _on_axes(draw), keyed=keyed)


def bars(
    data: Mapping[str, Mapping[str, float] | None],
    x: str,
    *,
    spread: Mapping[str, float | None] | None = None,
    colours: Callable[[str], str] | None = None,
    start: float = 0.0,
    keyed: bool = False,
) -> Plot:
    """A bar for each label, made of its named parts one after the other, its total at its end.

    ``spread``: of a label's total. ``colours``: of labels, in place of the parts' own. ``start``:
    where the axis starts.
    """
    totals = {label: sum(parts.values()) for label, parts in data.items() if parts}

    def draw(axes: Axes) -> None:
        kinds = list(next(parts for parts in data.values() if parts))
        shown: set[str] = set()
        for index, (label, parts) in enumerate(data.items()):
            if not parts:
                continue
            left, name = 0.0, _shorten(label)
            for kind, colour in zip(kinds, _PART_COLOURS[-len(kinds) :], strict=True):
                bar = axes.barh(
                    name, parts[kind], left=left, height=0.62,
                    color=colours(label) if colours else colour,
                    label="_" if kind in shown else kind,
                )  # fmt: skip
                _mark(index, *bar.patches)
                shown.add(kind)
                left += parts[kind]
            error = (spread or {}).get(label)
            if error is not None:
                drawn = axes.errorbar(
                    left, name, xerr=error, color=matplotlib.rcParams["text.color"], elinewidth=1
                )
                _mark(index, *drawn.get_children())
            text = axes.annotate(
                f"{left:,.3g}" if left < 1000 else f"{left:,.0f}",
                (left + (error or 0.0), name), (4, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
            _mark(index, text)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x)
        axes.set_xlim(start, start + 1.18 * (max(totals.values()) - start) or 1.0)

    lines = sum(_shorten(label).count("\n") + 1 for label in totals)
    size = (_SIZE[0], 1.1 + 0.18 * lines + 0.14 * len(totals))
    parts = next((parts for parts in data.values() if parts), {})
    drawn = _on_axes(draw, legend="always" if len(parts) > 1 else "never")
    return Plot(f"{x}: {_in_words(totals)}", drawn, size=size, keyed=keyed)


def heat_map(
    rows: Mapping[str, Sequence[float | None]],
    columns: Sequence[str],
    x: str,
    y: str,
    value: str,
    *,
    centre: float | None = None,
    limits: tuple[float, float] | None = None,
    form: str = "{:.0f}",
) -> Plot:
    """A cell for each row and column, the first row at the top; white where there is no value.

    ``centre``: a value that matters, which is grey; what is below is blue, what is above orange.
    """
    values = [v for row in rows.values() for v in row if v is not None and math.isfinite(v)]
    low, high = limits or ((min(values), max(values)) if values else (0.0, 1.0))

    def draw(figure: SubFigure | Figure, legend: bool) -> None:
        from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm

        axes = figure.subplots()
        norm, colours = Normalize(low, high), matplotlib.colormaps["viridis"]
        cells = [[math.nan if v is None else v for v in row] for row in rows.values()]
        if centre is not None:
            norm = TwoSlopeNorm(centre, low, high)
            colours = LinearSegmentedColormap.from_list("", ["#2f6fb3", "#c9ccd1", "#d9691e"])
        image = axes.imshow(cells, aspect="auto", cmap=colours, norm=norm, interpolation="none")
        if len(columns) <= CELLS:
            for i, row in enumerate(cells):
                for j, cell in enumerate(row):
                    if math.isfinite(cell):
                        red, green, blue, _ = colours(norm(cell))
                        light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
                        axes.text(
                            j, i, form.format(cell), ha="center", va="center", fontsize=7.5,
                            color="#111111" if light else "#ffffff",
                        )  # fmt: skip
        step = max(1, math.ceil(len(columns) / CELLS))
        axes.set_xticks(range(0, len(columns), step), list(columns)[::step])
        every = max(1, math.ceil(len(rows) / 24))
        names = [_shorten(name) for name in rows]
        axes.set_yticks(range(0, len(rows), every), names[::every], fontsize=8)
        axes.set(xlabel=x, ylabel=y)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, label=value, pad=0.02)
        bar.outline.set_visible(False)
        if centre is not None:
            bar.ax.axhline(centre, color=matplotlib.rcParams["text.color"], linewidth=1)

    alt = f"{value} by {y} and {x}: from {low:.3g} to {high:.3g}"
    return Plot(alt, draw, size=(_SIZE[0], min(6.0, 1.1 + 0.22 * max(len(rows), 4))))


def spectra(layers: Mapping[str, Sequence[Sequence[float]]], x: str, y: str) -> Plot:
    """Singular values of each layer, a panel a layer, one scale for all; for each epoch a line from
    the largest to the smallest, evenly spread, the last one darkest."""
    columns = min(3, len(layers))
    lines = math.ceil(len(layers) / columns)
    top = {name: max((max(epoch) for epoch in epochs), default=1.0) or 1.0
           for name, epochs in layers.items()}  # fmt: skip

    def draw(figure: SubFigure | Figure, legend: bool) -> None:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        panels = [axes for row in grid for axes in row]
        for axes, (name, epochs) in zip(panels, layers.items(), strict=False):
            for i, values in enumerate(epochs):
                at = [100 * k / max(len(values) - 1, 1) for k in range(len(values))]
                age = (i + 1) / len(epochs)
                axes.plot(
                    at, [value / top[name] or math.nan for value in values],
                    color=COLOURS[0], alpha=0.15 + 0.85 * age**2, linewidth=0.8 + 0.8 * age,
                )  # fmt: skip
            axes.set_title(_shorten(name, _LABEL // 2), fontsize=8)
            _scale_logarithmically(axes)
        for axes in panels[len(layers) :]:
            axes.set_visible(False)
        figure.supxlabel(x, fontsize=9.5, color=matplotlib.rcParams["text.color"])
        figure.supylabel(y, fontsize=9.5, color=matplotlib.rcParams["text.color"])

    last = {
        name: epochs[-1][-1] / (epochs[-1][0] or 1.0) for name, epochs in layers.items() if epochs
    }
    alt = f"{y} by {x}; smallest over largest after the last epoch: {_in_words(last)}"
    return Plot(alt, draw, size=(_SIZE[0], 0.9 + 1.15 * lines))


def _scale_logarithmically(axes: Axes) -> None:
    """Along y. Matplotlib would write powers as formulas, which plain text has none of."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _shorten(label: str, width: int = _LABEL) -> str:
    """``label`` in at most three short lines."""
    return "\n".join(textwrap.wrap(label, width, max_lines=3, placeholder=" …")) or "–"


def _on_axes(
    draw: Callable[[Axes], None], legend: str = "asked"
) -> Callable[[SubFigure | Figure, bool], None]:
    """A figure of one pair of axes, drawn by ``draw``, with a legend above it if there are several
    labels."""

    def on_figure(figure: SubFigure | Figure, asked: bool) -> None:
        axes = figure.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1 and (legend == "always" or (asked and legend == "asked")):
            figure.legend(handles, labels, loc="outside upper center", ncols=2)

    return on_figure


def _render(plots: Sequence[Plot], kind: str, style: Mapping[str, Any], *, legend: bool) -> bytes:
    from matplotlib.figure import Figure

    width, height = sum(plot.size[0] for plot in plots), max(plot.size[1] for plot in plots)
    buffer = io.BytesIO()
    with matplotlib.rc_context(cast(Any, style)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page has its own fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subfigures(1, len(plots), squeeze=False)[0] if len(plots) > 1 else [figure]
        for panel, plot in zip(panels, plots, strict=True):
            plot.draw(panel, legend)
        metadata = {"Date": None} if kind == "svg" else {}
        page = style is _STYLE
        figure.savefig(buffer, format=kind, dpi=200, transparent=page, metadata=metadata)
    return buffer.getvalue()


def _mean_curve(seeds: Seeds) -> list[tuple[float, float, float, float]]:
    """``(x, mean, lowest, highest)`` for each place along the curves; NaN for what is missing."""
    longest = max(map(len, seeds), default=0)
    columns = [[seed[i] for seed in seeds if i < len(seed)] for i in range(longest)]
    found = []
    for column in columns:
        values = [math.nan if y is None else y for _, y in column]
        at = statistics.mean(x for x, _ in column)
        found.append((at, sum(values) / len(values), min(values), max(values)))
    return found


def _across(axes: Axes, lines: Mapping[str, float]) -> None:
    for name, at in lines.items():
        axes.axhline(
            at,
            color=matplotlib.rcParams["text.color"],
            linewidth=0.9,
            linestyle=(0, (2, 2)),
            alpha=0.7,
            zorder=1,
        )
        axes.annotate(
            name, (1, at), (-2, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", fontsize=8, alpha=0.8,
        )  # fmt: skip


def _apart(heights: Mapping[str, float], low: float, high: float) -> dict[str, float]:
    """Where labels go beside ``heights`` so that no two overlap: from the top down."""
    room = (high - low) / 16
    found: dict[str, float] = {}
    below = high
    for label, height in sorted(heights.items(), key=lambda item: -item[1]):
        found[label] = below = min(height, below - room)
    return found


def _mark(index: int, *artists: Artist | None) -> None:
    for artist in filter(None, artists):
        artist.set_gid(f"label{index}")


def _in_words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {value:.3g}" for label, value in values.items()) or "none yet"
