"""The figure of a sweep: every variant's test recall, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.experiments.recipe import Recipe
from ckd_fed.experiments.summary import Line


def draw(recipe: Recipe, lines: Sequence[Line]) -> Figure:
    """A panel for each dataset and backbone; a row for each variant: hollow dots are seeds, the bar is their mean."""
    panels = list(dict.fromkeys((line.dataset, line.backbone) for line in lines))
    rows = max(sum((line.dataset, line.backbone) == panel for line in lines) for panel in panels)
    made = Figure(figsize=(6.2, (0.9 + 0.3 * rows) * len(panels) + 0.4), layout="constrained")
    axes = made.subplots(len(panels), 1, squeeze=False)[:, 0]
    made.suptitle(recipe.title, fontsize=11)
    for panel, place in zip(panels, axes, strict=True):
        own = [line for line in lines if (line.dataset, line.backbone) == panel]
        for row, line in enumerate(own):
            values = line.values[METRIC]
            place.plot(values, [row] * len(values), "o", color="black", markerfacecolor="white", markersize=5, linestyle="none")
            place.plot([np.mean(values)], [row], "|", color="black", markersize=13, markeredgewidth=2.2)
        place.axvline(float(np.mean(own[0].values[METRIC])), color="black", linewidth=0.8, linestyle=(0, (2, 2)))
        place.set_yticks(range(len(own)), [line.variant for line in own])
        place.set_ylim(len(own) - 0.5, -0.5)
        place.margins(x=0.08)
        place.locator_params(axis="x", nbins=6)
        place.set_xlabel(f"Recall@20 on test, {panel[0]}, {panel[1]} (○ a seed, | their mean; dashed: {own[0].variant})")
    return made
