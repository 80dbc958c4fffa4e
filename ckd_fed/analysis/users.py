"""A run's test metrics user by user, ``test_users.npz``: what paired comparisons of runs need."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.errors import DataError
from ckd_fed.evaluation.tested import UserTest
from ckd_fed.files import write_atomically

FILE = "test_users.npz"


@dataclass(frozen=True)
class UserTable:
    """Test metrics of every user with held-out items.

    Attributes:
        split: fingerprint of the split.
        users: ``(n,)`` ids, ascending.
        values: ``<model>/<metric>`` -> ``(n,)`` float32, for example ``student/recall@20``.
    """

    split: str
    users: np.ndarray
    values: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write as a compressed .npz: some 50 kB a model for 10,000 users."""
        out = io.BytesIO()
        arrays: dict[str, Any] = {"split": np.array(self.split), "users": self.users.astype(np.int32), **self.values}
        np.savez_compressed(out, **arrays)
        write_atomically(path, out.getvalue())


def load_users(path: Path) -> UserTable:
    """Read what :meth:`UserTable.save` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return UserTable(str(arrays.pop("split")), arrays.pop("users").astype(np.int64), arrays)
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def user_table(split: str, models: Mapping[str, UserTest]) -> UserTable:
    """One table of several models' tests of the same users.

    Args:
        split: its fingerprint.
        models: name -> its test.

    Raises:
        DataError: they were tested on different users.
    """
    (first, found), *others = models.items()
    for name, other in others:
        if not np.array_equal(other.users, found.users):
            raise DataError(f"{first} and {name} were tested on different users")
    values = {f"{model}/{metric}": column for model, tested in models.items() for metric, column in tested.values.items()}
    return UserTable(split, found.users, values)
