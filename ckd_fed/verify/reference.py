"""A reference file being verified: its arrays, and the largest error of each group of numbers so far."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.base import Triples
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import DataError


class Reference:
    """Arrays of a reference file by name; a name that is not there raises KeyError.

    Attributes:
        errors: group -> largest relative error so far.
        checked: names of the arrays that were held against ours.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.errors: dict[str, float] = {}
        self.checked: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Open a file; objects are never unpickled.

        Raises:
            DataError: no such file, or no readable archive.
        """
        if not path.exists():
            raise DataError(f"{path} does not exist")
        if not path.is_file():
            raise DataError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; name a reference file, an .npz archive")
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no zip archive (a single array?)")
            with np.load(path, allow_pickle=False) as archive:
                return cls({name: archive[name] for name in archive.files})
        except Exception as error:  # numpy, zipfile and zlib each raise their own types
            raise DataError(f"{path} cannot be read as an .npz archive: {type(error).__name__}: {' '.join(str(error).split())}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def names(self, prefix: str = "") -> list[str]:
        """Names that start with a prefix, in the file's order."""
        return [name for name in self._arrays if name.startswith(prefix)]

    def number(self, name: str) -> float:
        """A scalar."""
        return float(self[name])

    def tensor(self, name: str) -> Tensor:
        """An array as a float64 tensor, or an int64 one if it holds whole numbers."""
        array = self[name]
        return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iub" else np.float64))

    def interactions(self, name: str) -> Interactions:
        """The training interactions in a dense 0/1 matrix ``(n_users, n_items)``."""
        rows, columns = np.nonzero(self[name])
        return Interactions.from_pairs(rows, columns, *self[name].shape)

    def triples(self, users: str, first: str, second: str) -> Triples:
        """A batch from three index arrays."""
        return Triples(*(torch.from_numpy(self[name].astype(np.int64)) for name in (users, first, second)))

    def check(self, group: str, ours: Tensor | np.ndarray | float, name: str) -> None:
        """Hold a number or array of ours against one of the file's, as part of a group."""
        if isinstance(ours, Tensor):
            ours = ours.detach().numpy()
        self.checked.add(name)
        self.errors[group] = max(self.errors.get(group, 0.0), relative_error(np.asarray(ours), self[name]))

    def unchecked(self, prefixes: Iterable[str]) -> list[str]:
        """Names under some prefixes that nothing was held against."""
        return [name for name in self._arrays if name.startswith(tuple(prefixes)) and name not in self.checked]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|ours - theirs| / max|theirs|; infinite for different shapes or a NaN on either side."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float(np.abs(ours - theirs).max(initial=0.0))
    scale = float(np.abs(theirs).max(initial=0.0))
    error = difference / scale if scale > 0 else difference
    return error if np.isfinite(error) else float("inf")
