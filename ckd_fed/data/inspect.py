"""What is in a dataset and what is wrong with it, measured and put into words."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ckd_fed.data.dataset import SPLITS, Dataset
from ckd_fed.data.manifest import read_manifest
from ckd_fed.data.signal import K, Signal, content_signal

BINS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 1000)  # lower ends of the degree histograms
_BLOCK = 1024


@dataclass(frozen=True)
class ModalityReport:
    """One modality's features, measured over the items that have it.

    Attributes:
        dimension, dtype: of the features.
        mean, std: of all entries.
        norm: mean length of a row.
        off_centre: length of the mean row relative to ``norm``: 0 is centred, 1 is all rows alike.
        missing: items that the mask says lack it.
        zero: rows of zeros that are not masked.
        duplicate: rows equal to one before.
        most_alike: size of the largest group of equal rows, 1 where no two are.
        alike_is_mean: whether that group's row is the mean of the others, as published sets fill gaps.
        constant: columns with one value throughout.
        widest: the column that varies most.
        widest_share: its share of the variance of all columns.
        signal: content-neighbour recall; None where no user could be ranked.
    """

    dimension: int
    dtype: str
    mean: float
    std: float
    norm: float
    off_centre: float
    missing: int
    zero: int
    duplicate: int
    most_alike: int
    alike_is_mean: bool
    constant: int
    widest: int
    widest_share: float
    signal: Signal | None


@dataclass(frozen=True)
class Report:
    """A dataset, measured; see :func:`inspect`."""

    dataset: Dataset
    user_degree: np.ndarray
    item_degree: np.ndarray
    modalities: dict[str, ModalityReport]
    warnings: list[str]

    @property
    def interactions(self) -> int:
        return sum(len(getattr(self.dataset, split)) for split in SPLITS)

    @property
    def sparsity(self) -> float:
        """Share of the user-item pairs without an interaction."""
        return 1 - self.interactions / (self.dataset.n_users * self.dataset.n_items)


def inspect(dataset: Dataset) -> Report:
    """Measure a dataset."""
    user_degree = dataset.train.degree
    item_degree = np.bincount(dataset.train.items, minlength=dataset.n_items)
    modalities = {modality: _inspect_modality(dataset, modality) for modality in dataset.modalities}
    return Report(dataset, user_degree, item_degree, modalities, [*_split_warnings(dataset, item_degree), *_feature_warnings(dataset, modalities)])


def _inspect_modality(dataset: Dataset, modality: str) -> ModalityReport:
    features, mask = dataset.features[modality], dataset.masks.get(modality)
    present = np.flatnonzero(mask) if mask is not None else np.arange(len(features))
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    norms = np.empty(len(present))
    low, high = np.full(features.shape[1], np.inf), np.full(features.shape[1], -np.inf)
    rows: list[bytes] = []
    for start in range(0, len(present), _BLOCK):
        block = np.asarray(features[present[start : start + _BLOCK]])
        exact = block.astype(np.float64)
        total += exact.sum(axis=0)
        squares += (exact**2).sum(axis=0)
        norms[start : start + len(block)] = np.linalg.norm(exact, axis=1)
        low, high = np.minimum(low, exact.min(axis=0)), np.maximum(high, exact.max(axis=0))
        rows += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in np.ascontiguousarray(block)]
    n = len(present)
    groups = Counter(rows)
    zero = int((norms == 0).sum())
    row, alike = groups.most_common(1)[0]
    mean_row = total / n
    like_mean = False
    if 1 < alike < n:
        first = np.asarray(features[present[rows.index(row)]], dtype=np.float64)
        others = (total - alike * first) / (n - alike)
        like_mean = bool(np.linalg.norm(first - others) < 0.01 * max(float(np.linalg.norm(others)), 1e-12)) and bool(first.any())
    variance = np.where(low == high, 0.0, np.maximum(0.0, squares / n - mean_row**2))  # which need not come out as 0
    widest = int(variance.argmax())
    mean = float(total.sum()) / (n * features.shape[1])
    norm = float(norms.mean())
    return ModalityReport(
        features.shape[1],
        str(features.dtype),
        mean,
        float(np.sqrt(max(0.0, float(squares.sum()) / (n * features.shape[1]) - mean**2))),
        norm,
        float(np.linalg.norm(mean_row)) / norm if norm else 0.0,
        len(features) - n,
        zero,
        n - len(groups),
        alike,
        like_mean,
        int((low == high).sum()),
        widest,
        float(variance[widest] / variance.sum()) if variance.any() else 0.0,
        content_signal(dataset, modality),
    )


def _split_warnings(dataset: Dataset, item_degree: np.ndarray) -> list[str]:
    warnings = []
    untrained = int((dataset.train.degree == 0).sum())
    if untrained:
        warnings.append(f"{untrained:,} users have no training item: nothing is learnt for them, and ranking for them is chance")
    cold = int((item_degree == 0).sum())
    if cold:
        held = np.concatenate([dataset.val.items, dataset.test.items])
        asked = int((item_degree[held] == 0).sum())
        warnings.append(f"{cold:,} items are never trained; {asked:,} of {len(held):,} val and test interactions ask for one of them")
    for split in ("val", "test"):
        users = len(getattr(dataset, split).users)
        if users < 100:
            warnings.append(f"only {users} users have a {split} item: its recall is a coarse measure")
    if read_manifest(dataset.directory) is None:
        warnings.append("there is no manifest: where these files come from is not recorded, and a change to them goes unnoticed")
    return warnings


def _feature_warnings(dataset: Dataset, modalities: dict[str, ModalityReport]) -> list[str]:
    warnings = []
    for name, one in modalities.items():
        has = dataset.n_items - one.missing
        if one.zero:
            warnings.append(
                f"{name}: {one.zero:,} items have a row of zeros but are not masked; if they lack the modality, say so in {name}_mask.npy"
            )
        if one.most_alike > max(4, has // 200) and one.zero != one.most_alike:
            filler = (
                "the mean of the others, which is how published sets fill gaps" if one.alike_is_mean else "perhaps a filler or a placeholder image"
            )
            warnings.append(f"{name}: {one.most_alike:,} items have one and the same row, {filler}; mask them if they lack the modality")
        elif one.duplicate - max(0, one.zero - 1) > has // 20:
            warnings.append(f"{name}: {one.duplicate:,} rows repeat another item's; items with equal rows cannot be told apart by it")
        if one.off_centre > 0.5:
            warnings.append(
                f"{name}: not centred, its mean row is {one.off_centre:.0%} as long as its rows; all items look alike until it is centred"
            )
        if one.constant:
            warnings.append(f"{name}: {one.constant:,} of {one.dimension:,} columns are constant and say nothing")
        if one.dimension > 1 and one.widest_share > (0.5 if one.dimension >= 10 else 0.9):
            warnings.append(
                f"{name}: column {one.widest} holds {one.widest_share:.0%} of the variance of all {one.dimension:,}; if it is an index or an id, "
                "leave it out, else z-score puts the columns on one scale"
            )
        if one.missing * 2 > dataset.n_items:
            warnings.append(f"{name}: {one.missing / dataset.n_items:.0%} of the items lack it; its teacher knows little of most items")
        if one.signal is not None and one.signal.users == 1:
            warnings.append(f"{name}: whether it carries a signal cannot be told from one user with training and validation items")
        elif one.signal is not None and not one.signal.carries:
            warnings.append(
                f"{name}: cannot be told from shuffled features by what users chose (recall@{K} {one.signal.recall:.4f}, shuffled "
                f"{one.signal.shuffled:.4f}, {_difference(one.signal)}); are its rows those of these items?"
            )
    lengths = {name: one.norm for name, one in modalities.items() if one.norm}
    if lengths and max(lengths.values()) > 10 * min(lengths.values()):
        long, short = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
        warnings.append(
            f"rows of {long} are {lengths[long] / lengths[short]:.0f} times as long as those of {short}; the longer ones are learnt faster"
        )
    return warnings


def histogram(degree: np.ndarray) -> list[tuple[str, int]]:
    """Counts of degrees in the bins of :data:`BINS`, with their names, up to the last that is not empty."""
    ends = (*BINS[1:], np.iinfo(np.int64).max)
    counts = [int(((degree >= low) & (degree < end)).sum()) for low, end in zip(BINS, ends, strict=True)]
    last = max(k for k, count in enumerate(counts) if count)
    names = [str(low) if end == low + 1 else f"{low}+" if end > 10**6 else f"{low}-{end - 1}" for low, end in zip(BINS, ends, strict=True)]
    return list(zip(names, counts, strict=True))[: last + 1]


def describe(report: Report) -> list[str]:
    """The report in lines of text."""
    dataset = report.dataset
    sizes = ", ".join(f"{split} {len(getattr(dataset, split)):,}" for split in SPLITS)
    lines = [
        f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, {report.interactions:,} interactions ({sizes})",
        f"sparsity {report.sparsity:.4%} (share of pairs without an interaction)",
        *_degree_lines("training items of a user", report.user_degree),
        *_degree_lines("training users of an item", report.item_degree),
    ]
    for name, one in report.modalities.items():
        lines.append(f"{name}: {one.dimension}-d {one.dtype}, mean {one.mean:.4g}, std {one.std:.4g}, rows of length {one.norm:.4g} on average")
        lines.append(f"  {one.missing:,} items lack it, {one.zero:,} rows of zeros, {one.duplicate:,} rows equal to one before")
        if one.signal is not None:
            times = f" ({one.signal.recall / one.signal.shuffled:.1f} times)" if one.signal.shuffled else ""
            users = f"{one.signal.users:,} users" if one.signal.users > 1 else "1 user"
            lines.append(
                f"  signal: recall@{K} of its nearest items {one.signal.recall:.4f}, with shuffled features {one.signal.shuffled:.4f}{times}, "
                f"{_difference(one.signal)}, {users}"
            )
    lines += [f"warning: {warning}" for warning in report.warnings] or ["no warnings"]
    return lines


def _difference(signal: Signal) -> str:
    """How far the recall is above the shuffled one, with the standard error where there is one."""
    error = "" if np.isnan(signal.error) else f" ± {signal.error:.4f}"
    return f"difference {signal.recall - signal.shuffled:+.4f}{error}"


def _degree_lines(what: str, degree: np.ndarray) -> list[str]:
    least, quarter, half, three, most = (int(q) for q in np.quantile(degree, (0, 0.25, 0.5, 0.75, 1), method="lower"))
    table = histogram(degree)
    peak = max(count for _, count in table)
    bars = [f"  {name:>8} {'#' * round(40 * count / peak):<40} {count:,}" for name, count in table]
    return [f"{what}: {least} to {most}, half of them {half} or fewer, the middle half {quarter} to {three}, mean {degree.mean():.2f}", *bars]
