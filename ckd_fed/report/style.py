"""How figures look: narrow enough for a phone, and told apart without colour (hatches, line styles, markers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ckd_fed.report.diagnosis import DISTILLED, PLAIN, TEACHER

WIDTH = 4.5  # inches; on a phone of 360 pixels its 10-point letters are still 10 pixels high
RC: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.ymargin": 0.1,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "path",  # the same letters on every machine, and no font to fetch
}

# Okabe and Ito's colours, each with dashes and a marker of its own.
_LINES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#56B4E9", (0, (5, 1, 1, 1)), "v"),
    ("#000000", (0, (3, 1)), "x"),
    ("#E69F00", (0, (8, 2)), "P"),
    ("#777777", (0, (1, 1)), "*"),
)
BARS: dict[str, dict[str, Any]] = {
    TEACHER: {"facecolor": "white", "edgecolor": "black", "hatch": "...."},
    PLAIN: {"facecolor": "#E69F00", "edgecolor": "black", "hatch": "////"},
    DISTILLED: {"facecolor": "#0072B2", "edgecolor": "black"},
}


def styled() -> Any:
    """A context in which figures are drawn and saved in this style."""
    return rc_context(RC)  # type: ignore[arg-type]


def figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of the report's width with some panels one above the other, sharing their x axis."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = made.subplots(rows, 1, sharex=rows > 1, squeeze=False)
    return made, list(axes[:, 0])


def plain_label(text: str) -> str:
    """A text that matplotlib draws as it stands: no mathematics between dollar signs, and in a legend though it begins with an underscore."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    """A line with dashes and markers of its own; at most a dozen markers however many points there are."""
    colour, dashes, marker = _LINES[index % len(_LINES)]
    every = max(1, len(x) // 12)
    # lines that share their x would put their markers on one another; shift them by a share of the spacing
    start = (index * every // 3) % every if every > 2 else 0
    axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, markersize=4.5, markevery=(start, every), linewidth=1.6, label=label)


def reference(axes: Axes, y: float, label: str) -> None:
    """A horizontal line that others are read against."""
    axes.axhline(y, color="black", linewidth=0.9, linestyle=(0, (2, 2)), label=label)


def whole_numbers(axes: Axes) -> None:
    """Ticks of an axis of rounds or epochs; an axis of one point gets some room."""
    low, high = axes.get_xlim()
    if high - low < 2:
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def legend_below(made: Figure, axes: Axes, columns: int = 2) -> None:
    """One legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        made.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=min(columns, len(unique)))
