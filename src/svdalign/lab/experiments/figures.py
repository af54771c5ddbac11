"""Figures: as inline SVG that takes its ink from the page, so that it reads on light and on dark,
and as files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "accuracy_curves", "bars", "heat_map", "lines", "loss_curves"]

COLOURS = (
    "#4c86c6",
    "#e07b39",
    "#3f9e6e",
    "#c9507c",
    "#8a6fd1",
    "#b0902c",
    "#2fa3ad",
    "#9a6a4f",
    "#7f8893",
)
PART_COLOURS = ("#b0902c", "#e07b39", "#3f9e6e", "#4c86c6")
DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))
INK, RULE = "#010203", "#040506"  # stand-ins that the page's own colours replace
FILE_COLOURS = {INK: "#1c2430", RULE: "#c5cbd3"}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "svdalign",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

Curves = Mapping[str, Sequence[Sequence[float | None]]]
"""By label, for each seed, a value an epoch."""


@dataclass(frozen=True)
class Plot:
    """A figure yet to be drawn; ``title`` is read out in its place where it cannot be seen."""

    title: str
    draw: Callable[[Axes], None]
    height: float = 3.1

    def svg(self) -> str:
        """For a page: ink and rules are the page's."""
        svg = self._render("svg", STYLE).decode("utf-8")
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{self.title}" ', 1)
        return svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")

    def save(self, stem: Path) -> None:
        """Write ``stem.svg`` and ``stem.png``, dark on white."""
        style = {
            key: FILE_COLOURS.get(value, value) if isinstance(value, str) else value
            for key, value in STYLE.items()
        }
        for kind in ("svg", "png"):
            stem.with_suffix(f".{kind}").write_bytes(self._render(kind, style))

    def _render(self, kind: str, style: Mapping[str, Any]) -> bytes:
        from matplotlib.figure import Figure

        buffer = io.BytesIO()
        with matplotlib.rc_context(cast(Any, style)):
            figure = Figure(figsize=(4.2, self.height), layout="constrained")
            self.draw(figure.subplots())
            page = style is STYLE
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(buffer, format=kind, dpi=200, transparent=page, metadata=metadata)
        return buffer.getvalue()


def accuracy_curves(curves: Curves, images: str = "test") -> Plot:
    """Accuracy on ``images`` by epoch: the mean over seeds, the range between them shaded."""
    return Plot(
        f"{images.capitalize()} accuracy by epoch",
        lambda axes: _draw(axes, curves, f"{images} accuracy (%)", 100),
    )


def loss_curves(curves: Curves) -> Plot:
    """Training loss by epoch, likewise."""
    return Plot("Training loss by epoch", lambda axes: _draw(axes, curves, "training loss", 1))


def lines(curves: Curves, label: str) -> Plot:
    """Any other value by epoch, likewise."""
    return Plot(label, lambda axes: _draw(axes, curves, label, 1))


def bars(parts: Mapping[str, Mapping[str, float]], label: str) -> Plot:
    """One bar for each key of ``parts``, made of its named parts one after the other."""

    def draw(axes: Axes) -> None:
        names = list(parts)
        kinds = list(next(iter(parts.values())))
        left = [0.0] * len(names)
        for kind, colour in zip(kinds, PART_COLOURS[-len(kinds) :], strict=True):
            widths = [parts[name][kind] for name in names]
            axes.barh(names, widths, left=left, height=0.6, color=colour, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if len(kinds) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)

    return Plot(label, draw, height=1.5 + 0.3 * len(parts))


def heat_map(points: Mapping[tuple[float, float], float], x: str, y: str, label: str) -> Plot:
    """A cell for each ``(x, y)``, its value written in it; both axes in even steps."""

    def draw(axes: Axes) -> None:
        columns, rows = (sorted({point[i] for point in points}) for i in (0, 1))
        grid = [[points.get((at, line), math.nan) for at in columns] for line in rows]
        axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis")
        low, high = min(points.values()), max(points.values())
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                ink = "black" if value > (low + high) / 2 else "white"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(columns)), [f"{at:g}" for at in columns])
        axes.set_yticks(range(len(rows)), [f"{line:g}" for line in rows])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(label, fontsize=9.5)
        axes.grid(visible=False)

    return Plot(f"{label} by {x} and {y}", draw)


def _draw(axes: Axes, curves: Curves, label: str, scale: float) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, (name, seeds) in enumerate(curves.items()):
        epochs = max(map(len, seeds), default=0)
        if not epochs:
            continue
        columns = [
            [_number(seed[epoch]) * scale for seed in seeds if epoch < len(seed)]
            for epoch in range(epochs)
        ]
        x = list(range(1, epochs + 1))
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            x,
            [sum(column) / len(column) for column in columns],
            label=name,
            color=colour,
            dashes=DASHES[i % len(DASHES)],
            marker="o",
            markersize=3,
        )
        if len(seeds) > 1:
            low, high = ([pick(column) for column in columns] for pick in (min, max))
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.03)
    if len(axes.lines) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)


def _number(value: float | None) -> float:
    """JSON keeps what is not finite as null."""
    return math.nan if value is None else value
