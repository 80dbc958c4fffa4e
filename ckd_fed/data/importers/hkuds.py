"""The layout of HKUDS's multimodal sets (MMSSL and its successors): pickled sparse matrices and ``<modality>_feat.npy``.

The matrices are users × items, ``train_mat``, ``val_mat`` and ``test_mat`` or ``trnMat.pkl``, ``valMat.pkl`` and ``tstMat.pkl``; an entry that
is not zero is an interaction. The pickles are read without executing them (:mod:`ckd_fed.data.importers.safe_pickle`); a matrix converted
to scipy's ``.npz`` is taken too.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from scipy import sparse

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.draft import Draft
from ckd_fed.data.importers.positional import draft_by_position, feature_files
from ckd_fed.data.importers.safe_pickle import read_sparse_pickle
from ckd_fed.errors import DataError

_STEMS = {"train": ("train_mat", "trnMat"), "val": ("val_mat", "valMat"), "test": ("test_mat", "tstMat")}


def find_matrix(directory: Path, split: str) -> Path | None:
    """The matrix file of a part; a converted one goes before the pickle it was made from."""
    names = [f"{stem}{ending}" for ending in (".npz", ".pkl.npz", "", ".pkl") for stem in _STEMS[split]]
    return next((directory / name for name in names if (directory / name).is_file()), None)


def read_hkuds(directory: Path) -> Draft:
    """Read the layout.

    Raises:
        DataError: anything missing, damaged or unreadable without executing it.
    """
    paths, matrices = [], {}
    for split in SPLITS:
        path = find_matrix(directory, split)
        if path is None:
            raise DataError(f"{directory} has no {_STEMS[split][0]}, nor {_STEMS[split][1]}.pkl")
        paths.append(path)
        matrices[split] = _read_npz(path) if path.suffix == ".npz" else read_sparse_pickle(path)
    shapes = {split: matrix.shape for split, matrix in matrices.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"{directory}: the matrices have different shapes, {shapes}; users and items must be the same in all")
    parts, seen = {}, sparse.csr_matrix(shapes["train"], dtype=np.int64)
    for split, matrix in matrices.items():
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        users, items = matrix.nonzero()
        parts[split] = (users.astype(np.int64), items.astype(np.int64))
        both = seen.multiply(matrix != 0).nonzero()
        if len(both[0]):
            raise DataError(f"{directory}: user {both[0][0]} has item {both[1][0]} in {split} and in a part before ({len(both[0]):,} such pairs)")
        seen = seen + (matrix != 0).astype(np.int64)
    return draft_by_position("hkuds", parts, feature_files(directory), rule={"rule": "as published"}, sources=paths, n_items=shapes["train"][1])


def _read_npz(path: Path) -> sparse.csr_matrix:
    try:
        return sparse.csr_matrix(sparse.load_npz(path))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path} is no sparse matrix that scipy.sparse.save_npz wrote ({type(error).__name__})") from None
