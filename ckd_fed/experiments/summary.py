"""What a sweep came to: one table, one figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckd_fed.analysis.history import RunHistory
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.experiments.recipe import Job, Recipe
from ckd_fed.files import write_atomically

NDCG = "ndcg@20"


@dataclass(frozen=True)
class Line:
    """One variant on one dataset with one backbone, over its seeds.

    Attributes:
        dataset, backbone, variant: what it is.
        seeds: that finished.
        values: column -> one value a seed: ``val recall@20``, ``recall@20``, ``ndcg@20`` (test), and ``reached <m>`` with teachers.
        gain: mean over seeds of the relative difference in test Recall@20 to the first variant of the same seed; None without one.
    """

    dataset: str
    backbone: str
    variant: str
    seeds: tuple[int, ...]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    gain: float | None = None


def summarise(recipe: Recipe, found: Mapping[Job, RunHistory]) -> list[Line]:
    """A line for each variant on each dataset with each backbone."""
    first = next(iter(recipe.variants))
    base = {(job.dataset, job.backbone, job.seed): history.tested("student")[METRIC] for job, history in found.items() if job.variant == first}
    groups: dict[tuple[str, str, str], list[Job]] = {}
    for job in found:
        groups.setdefault((job.dataset, job.backbone, job.variant), []).append(job)
    lines = []
    for key, group in groups.items():
        rows = [_columns(found[job]) for job in group]
        columns = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
        gains = [
            found[job].tested("student")[METRIC] / base[job.dataset, job.backbone, job.seed] - 1
            for job in group
            if job.variant != first and base.get((job.dataset, job.backbone, job.seed))
        ]
        lines.append(Line(*key, tuple(job.seed for job in group), columns, float(np.mean(gains)) if gains else None))
    return lines


def _columns(history: RunHistory) -> dict[str, float]:
    test = history.tested("student")
    reached = {f"reached {m}": history.final.get(f"final/reached/{m}") for m in history.modalities}
    views = {f"only {m}": test.get(f"only/{m}/{METRIC}") for m in history.modalities}
    found = {f"val {METRIC}": history.best, METRIC: test[METRIC], NDCG: test[NDCG], **views, **reached}
    return {name: float(value) for name, value in found.items() if value is not None}


def spread(values: Sequence[float]) -> str:
    """Mean and, from two values on, standard deviation: ``.0580 ± .0023``."""
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def table_rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    names = list(dict.fromkeys(name for line in lines for name in line.values))
    rows = []
    for line in lines:
        cells = []
        for name in names:
            values = line.values.get(name, ())
            cells.append("" if not values else f"{np.mean(values):.0%}" if name.startswith("reached ") else spread(values))
        gain = "" if line.gain is None else f"{line.gain:+.1%}"
        rows.append([line.dataset, line.backbone, line.variant, str(len(line.seeds)), *cells, gain])
    return ["dataset", "backbone", "variant", "seeds", *names, f"gain in {METRIC}"], rows


def write_summary(recipe: Recipe, lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.csv`` (every seed a row) and ``figure.png``."""
    header, rows = table_rows(lines)
    markdown = [
        f"# {recipe.title}",
        "",
        f"Test metrics of the student (`val`: validation), mean ± standard deviation over seeds; {NDCG} is the standard one.",
    ]
    markdown += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]
    write_atomically(folder / "table.md", ("\n".join(markdown) + "\n").encode())
    out = io.StringIO()
    writer = csv.writer(out)
    names = list(dict.fromkeys(name for line in lines for name in line.values))
    writer.writerow(["dataset", "backbone", "variant", "seed", *names])
    for line in lines:
        for place, seed in enumerate(line.seeds):
            cells = [line.values[name][place] if name in line.values else "" for name in names]
            writer.writerow([line.dataset, line.backbone, line.variant, seed, *cells])
    write_atomically(folder / "table.csv", out.getvalue().encode())

    from ckd_fed.experiments.figure import draw
    from ckd_fed.report.style import styled

    image = io.BytesIO()
    with styled():
        draw(recipe, lines).savefig(image, format="png", dpi=160)
    write_atomically(folder / "figure.png", image.getvalue())
    return [folder / name for name in ("table.md", "table.csv", "figure.png")]
