"""A picture of a dataset: degrees, lengths of feature rows, and what each modality tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ckd_fed.data.inspect import Report
from ckd_fed.errors import DataError


def plot_report(report: Report, path: Path) -> None:
    """Draw a report into a file whose ending decides the format.

    Raises:
        DataError: see :func:`check_format`.
    """
    check_format(path)
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    degrees, lengths, signal = figure.subplots(1, 3)
    for name, degree in (("items of a user", report.user_degree), ("users of an item", report.item_degree)):
        values, counts = np.unique(degree, return_counts=True)
        degrees.plot(values + 1, counts, ".", label=name)
    degrees.set(xscale="log", yscale="log", xlabel="degree + 1 (training)", ylabel="how many", title=report.dataset.name)
    degrees.legend()
    for name in report.modalities:
        features, mask = np.asarray(report.dataset.features[name], dtype=np.float32), report.dataset.masks.get(name)
        length = np.linalg.norm(features if mask is None else features[mask], axis=1)
        lengths.hist(length.astype(np.float64), bins=60, histtype="step", label=name)  # unit rows lie too close for 60 bins of float32
    lengths.set(xlabel="length of a feature row", ylabel="items", yscale="log")
    lengths.legend()
    measured = {name: one.signal for name, one in report.modalities.items() if one.signal is not None}
    at = np.arange(len(measured))
    signal.bar(at - 0.2, [one.recall for one in measured.values()], 0.4, label="features")
    signal.bar(at + 0.2, [one.shuffled for one in measured.values()], 0.4, label="shuffled")
    signal.set(ylabel="recall@20 of the nearest items")
    differences = [f"{one.recall - one.shuffled:+.4f}" + ("" if np.isnan(one.error) else f" ± {one.error:.4f}") for one in measured.values()]
    signal.set_xticks(at, [f"{name}\n{difference}" for name, difference in zip(measured, differences, strict=True)])
    signal.legend()
    figure.savefig(path, dpi=120)


def check_format(path: Path) -> None:
    """Refuse a file that could not be drawn into.

    Raises:
        DataError: the format is unknown to matplotlib, or the folder is not there.
    """
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise DataError(f"--plot {path}: {path.suffix or 'no ending'} is no format to draw in; use .png (or {', '.join(sorted(known))})")
    if not path.parent.is_dir():
        raise DataError(f"--plot {path}: the folder {path.parent} does not exist")
