"""A run's test metrics user by user, ``test_users.npz``: what paired comparisons of runs need."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.dataset import Dataset
from ckd_fed.errors import DataError
from ckd_fed.evaluation.groups import group_rows
from ckd_fed.evaluation.per_user import rank_users
from ckd_fed.home import write_atomically

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
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def rank_test_users(dataset: Dataset, models: Mapping[str, Embeddings], ks: Sequence[int]) -> tuple[UserTable, list[dict[str, Any]]]:
    """Rank the test set for every user with each model.

    Args:
        dataset: the split.
        models: name -> its embeddings, joint view.
        ks: cut-offs of the metrics; 20 among them.

    Returns:
        The table of users, and the rows of :func:`~ckd_fed.evaluation.groups.group_rows` of all models.
    """
    values: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for model, embeddings in models.items():
        rankings = rank_users(embeddings, dataset.train, dataset.test, max(ks))
        values.update({f"{model}/{metric}": column for metric, column in rankings.metrics(ks).items()})
        rows += group_rows(model, rankings, dataset.train, dataset.test)
    return UserTable(dataset.fingerprint, dataset.test.users, values), rows
