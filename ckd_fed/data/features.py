"""Item features of one modality: one ``<modality>_feat.npy``, memory-mapped and checked before anything uses it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from ckd_fed.errors import DataError

DTYPES = (np.dtype("<f4"), np.dtype("<f2"), np.dtype("<f8"))
_BLOCK_BYTES = 32 << 20


def open_npy(path: Path) -> np.ndarray:
    """Memory-map an ``.npy`` file without trusting it.

    The header is read first and held against the size of the file, so that a truncated file or a header that claims more than
    the file holds is refused before a byte of data is mapped. Object arrays are never unpickled.

    Returns:
        A read-only array of the header's shape, backed by the file.

    Raises:
        DataError: the file is missing, is no ``.npy``, holds objects, or is shorter or longer than its header says.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    with path.open("rb") as file:
        try:
            version = npy_format.read_magic(file)
            reader = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
            shape, fortran, dtype = reader(file)
        except Exception as error:  # a damaged header ends in whatever Python's tokenizer, parser or numpy's dtype makes of it
            raise DataError(f"{path} is not a readable .npy file (damaged header: {type(error).__name__}); write it with numpy.save") from None
        offset = file.tell()
    if not all(type(length) is int and 0 <= length < 2**48 for length in shape):
        raise DataError(
            f"{path} is damaged: its header claims the shape {ascii(shape)[:80] if len(shape) < 9 else 'of ' + str(len(shape)) + ' axes'}"
        )
    if dtype.hasobject:
        raise DataError(f"{path} holds Python objects (dtype {dtype}), which are never unpickled; save a float32 or float16 array")
    size = 1
    for length in shape:  # Python integers: a forged header cannot overflow
        size *= length
    expected, actual = offset + size * dtype.itemsize, os.path.getsize(path)
    if expected != actual:
        what = "is truncated: its" if actual < expected else "is longer than it should be: its"
        raise DataError(f"{path} {what} header claims shape {shape} of {dtype} = {expected:,} bytes, the file has {actual:,}")
    if size == 0:
        raise DataError(f"{path} is empty: its shape is {shape}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def load_features(path: Path, n_items: int) -> np.ndarray:
    """One modality's item features, checked.

    Args:
        path: the ``<modality>_feat.npy`` file.
        n_items: number of items in the split.

    Returns:
        Memory-mapped array of shape ``(n_items, dimension)``, float16, float32 or float64.

    Raises:
        DataError: wrong shape, dtype or number of rows, or a NaN or infinite entry (the first such column is named).
    """
    features = open_npy(path)
    if features.ndim != 2:
        raise DataError(f"{path} has shape {features.shape}; one row an item and one column a feature are needed, (items, dimension)")
    if features.dtype not in DTYPES:
        raise DataError(f"{path} has dtype {features.dtype}; save it as float32 or float16")
    if features.shape[0] != n_items:
        raise DataError(
            f"{path} has {features.shape[0]:,} rows but the split has {n_items:,} items (ids 0 to {n_items - 1}); one row an item is needed"
        )
    _check_finite(path, features)
    return features


def load_mask(path: Path, n_items: int) -> np.ndarray | None:
    """Which items have the modality, shape ``(n_items,)`` bool; None where no mask file exists (all have it)."""
    if not path.exists():
        return None
    mask = open_npy(path)
    if mask.shape != (n_items,):
        raise DataError(f"{path} has shape {mask.shape}; a mask has one entry an item, ({n_items},)")
    if mask.dtype.kind not in "buif":
        raise DataError(f"{path} has dtype {mask.dtype}; a mask is an array of 0 and 1 (bool or a number)")
    if not np.isin(mask, (0, 1)).all():
        raise DataError(f"{path} has entries other than 0 and 1 (first: {mask[~np.isin(mask, (0, 1))][0]}); 1 marks an item that has the modality")
    present = mask.astype(bool)
    if not present.any():
        raise DataError(f"{path} marks every item as lacking the modality; leave the modality out instead")
    return present


def features_fingerprint(features: np.ndarray) -> str:
    """sha256 over shape, dtype and bytes: two nodes with the same value hold the same features."""
    digest = hashlib.sha256(f"{features.shape}{features.dtype.str}".encode())
    for block in _blocks(features):
        digest.update(np.ascontiguousarray(block).tobytes())
    return digest.hexdigest()


def _blocks(features: np.ndarray) -> list[np.ndarray]:
    rows = max(1, _BLOCK_BYTES // max(1, features.shape[1] * features.dtype.itemsize))
    return [features[start : start + rows] for start in range(0, features.shape[0], rows)]


def _check_finite(path: Path, features: np.ndarray) -> None:
    bad = np.zeros(features.shape[1], dtype=np.int64)
    for block in _blocks(features):
        with np.errstate(over="ignore"):  # what float32, in which training runs, cannot hold is infinite
            bad += (~np.isfinite(block.astype(np.float32, copy=False))).sum(axis=0)
    if bad.any():
        columns = np.flatnonzero(bad)
        raise DataError(
            f"{path} has {int(bad.sum()):,} NaN or infinite entries in {len(columns)} of {features.shape[1]} columns "
            f"(first: column {columns[0]} with {int(bad[columns[0]])}); replace them before training"
        )
