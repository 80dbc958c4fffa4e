"""Feature transforms, fitted once on the items that have the modality, written into a dataset of their own and recorded in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ckd_fed.data.dataset import SPLITS, load_dataset
from ckd_fed.data.draft import Draft, ModalityDraft
from ckd_fed.data.manifest import read_manifest, source_record
from ckd_fed.errors import DataError, unknown

KINDS = ("none", "center", "z-score", "row-norm", "pca:N")


def transform(features: np.ndarray, mask: np.ndarray | None, text: str) -> np.ndarray:
    """Transformed features.

    Args:
        features: shape ``(n_items, dimension)``.
        mask: which items have the modality; None if all have. The others are left out of the fit and get rows of zeros.
        text: one of :data:`KINDS`, or several joined by ``+``, done from left to right. ``center`` subtracts the mean row (constant columns
            become 0); ``z-score`` also divides each column by its standard deviation; ``row-norm`` gives rows length 1 (rows of zeros stay);
            ``pca:N`` projects centred rows onto their N first principal components.

    Returns:
        Shape ``(n_items, dimension or N)`` float32.

    Raises:
        DataError: an unknown transform, or more components than the features have beyond the rounding of their dtype.
    """
    eps = float(np.finfo(features.dtype).eps)
    present = np.ones(len(features), dtype=bool) if mask is None else mask
    rows = np.asarray(features[present], dtype=np.float64)
    for kind in text.split("+"):
        rows = _step(rows, kind, eps)
    result = np.zeros((len(features), rows.shape[1]), dtype=np.float32)
    result[present] = rows
    return result


def _step(rows: np.ndarray, kind: str, eps: float) -> np.ndarray:
    name, _, number = kind.partition(":")
    if kind == "none":
        return rows
    if kind in ("center", "z-score"):
        constant = rows.min(axis=0) == rows.max(axis=0)  # whose mean and standard deviation need not come out exactly
        centred = (rows - rows.mean(axis=0)) * ~constant
        return centred if kind == "center" else centred / np.where(constant, 1, rows.std(axis=0))
    if kind == "row-norm":
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    if name == "pca" and number.isascii() and number.isdecimal():
        return _pca(rows, int(number), eps)
    raise DataError(unknown("transform", kind, KINDS))


def _pca(rows: np.ndarray, n: int, eps: float) -> np.ndarray:
    if not 1 <= n <= min(rows.shape):
        raise DataError(f"pca:{n} is asked of {rows.shape[0]:,} rows of {rows.shape[1]:,} dimensions; 1 to {min(rows.shape)} components are possible")
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    # Numbers of this dtype are off by a quarter of eps in the root mean square; the rest is eigh's own rounding.
    rounding = max(4 * eps**2 * float((rows**2).sum()) / rows.shape[1], float(values[-1]) * max(rows.shape) * float(np.finfo(np.float64).eps))
    rank = int((values > rounding).sum())
    if n > rank:
        raise DataError(f"pca:{n} is asked of features that have {rank} components beyond rounding; 1 to {rank} are possible")
    axes = vectors[:, ::-1][:, :n]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(n)])  # of two opposite directions one, always the same
    return centred @ axes


def transformed_draft(directory: Path, transforms: Mapping[str, str]) -> Draft:
    """A draft of a dataset with some modalities transformed and the others as they are.

    Args:
        directory: the dataset.
        transforms: modality -> transform, see :func:`transform`.

    Raises:
        DataError: the dataset has a fault or no such modality, or a transform is impossible.
    """
    dataset = load_dataset(directory, at_least=1)
    for modality in transforms:
        if modality not in dataset.modalities:
            raise DataError(f"{directory}: {unknown('modality', modality, dataset.modalities)}")
    manifest = read_manifest(directory) or {}
    said = manifest.get("modalities", {})
    modalities = {}
    for modality, features in dataset.features.items():
        before, text = said.get(modality, {}), transforms.get(modality, "none")
        changed = features if text == "none" else transform(features, dataset.masks.get(modality), text)
        done = "+".join(kind for kind in (before.get("transform", ""), "" if text == "none" else text) if kind)
        source = str(before.get("source", f"{modality}_feat.npy"))
        modalities[modality] = ModalityDraft(changed, dataset.masks.get(modality), source, str(before.get("encoder", "")), done)
    rule = {key: value for key, value in manifest.get("split", {"rule": "as in the dataset"}).items() if key not in (*SPLITS, "fingerprint")}
    names = [path for path in sorted(directory.glob("*")) if path.name in {*(f"{s}.json" for s in SPLITS), *(f"{m}_feat.npy" for m in modalities)}]
    return Draft(
        str(manifest.get("layout", "own")),
        dataset.user_ids,
        dataset.item_ids,
        {split: (part.row, part.items) for split, part in ((split, getattr(dataset, split)) for split in SPLITS)},
        modalities,
        rule,
        notes=list(manifest.get("notes", [])),
        earlier_sources=manifest.get("sources") or [source_record(path) for path in names],
    )
