"""The figure of a comparison of runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ckd_fed.analysis.compare import Comparison, Entry
from ckd_fed.analysis.history import series
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.files import write_atomically
from ckd_fed.report.style import WIDTH, legend_below, line, plain_label, styled, whole_numbers


def draw_comparison(entries: Sequence[Entry], found: Sequence[Comparison], metric: str) -> Figure:
    """Above, each difference to the first entry with its 95 % interval, if it has one; below, the entries' validation recall over epochs."""
    made = Figure(figsize=(WIDTH + 1.2, 3.6 + 0.3 * len(found)), layout="constrained")
    above, below = made.subplots(2, 1, height_ratios=[0.6 + 0.3 * len(found), 2.4])
    for place, comparison in enumerate(found[1:]):
        reach = [[comparison.difference - comparison.low], [comparison.high - comparison.difference]]
        above.errorbar([comparison.difference], [place], xerr=reach, fmt="o", color="black", capsize=4, markersize=5)
    above.axvline(0, color="black", linewidth=0.9, linestyle=(0, (2, 2)))
    above.set_yticks(range(len(found) - 1), [_short(comparison.label) for comparison in found[1:]])
    above.set_ylim(len(found) - 1.5, -0.5)
    above.grid(visible=False, axis="y")
    above.set_xlabel(f"difference in {metric} to {_short(found[0].label)}, test, 95 % interval")
    above.locator_params(axis="x", nbins=5)
    for index, entry in enumerate(entries):
        rows = entry.history.distillation if entry.model == "student" else entry.history.learners.get(entry.model, [])
        x, y = series(rows, "epoch", f"val/{METRIC}")
        line(below, index, x, y, _short(entry.label))
    below.set_xlabel("epoch")
    below.set_ylabel("Recall@20, validation")
    below.set_ylim(bottom=0)
    whole_numbers(below)
    legend_below(made, below)
    return made


def write_comparison(entries: Sequence[Entry], found: Sequence[Comparison], metric: str, path: Path) -> None:
    """Write the figure as PNG."""
    out = io.BytesIO()
    with styled():
        draw_comparison(entries, found, metric).savefig(out, format="png", dpi=160)
    write_atomically(path, out.getvalue())


def _short(label: str, longest: int = 32) -> str:
    name = label.rstrip("/").rpartition("/")[2] if label.count("/") > 1 else label
    return plain_label(name if len(name) <= longest else f"{name[: longest - 1]}…")
