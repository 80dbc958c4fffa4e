"""Recommendations of a trained student, and which modality speaks for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ckd_fed.analysis.student import Student
from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError
from ckd_fed.evaluation.ranking import top_items

IDS = "ids"  # what speaks for an item where no modality does: the users' and items' ID embeddings


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item: its number in the dataset.
        margin: how much the student prefers it to the user's average item, s(u,i) - mean_j s(u,j).
        contributions: modality -> what it adds to the margin: the margin minus that of the view without the modality (the numerator of
            the counterfactual effect).
    """

    item: int
    margin: float
    contributions: Mapping[str, float]

    @property
    def speaks(self) -> str:
        """The modality that adds most; ``ids`` where none adds anything."""
        best = max(self.contributions, key=lambda m: self.contributions[m])
        return best if self.contributions[best] > 0 else IDS


def find_user(dataset: Dataset, name: str) -> int:
    """Number of the user with an id of the source, or with that number where the dataset has no ``users.json``.

    Raises:
        ConfigError: there is no such user.
    """
    if name not in dataset.user_ids:
        raise ConfigError(f"user is {name!r}; {dataset.name} has {dataset.n_users:,} users with ids such as {dataset.user_ids[0]!r}")
    return dataset.user_ids.index(name)


def seen_items(dataset: Dataset) -> Interactions:
    """What users have already: their training and validation items."""
    parts = (dataset.train, dataset.val)
    users, items = np.concatenate([part.row for part in parts]), np.concatenate([part.items for part in parts])
    return Interactions.from_pairs(users, items, dataset.n_users, dataset.n_items)


def recommend(student: Student, user: int, k: int) -> list[Recommendation]:
    """The k best items for a user, items already seen left out; fewer where the user has seen nearly all.

    Raises:
        ConfigError: there is no such user, or k is not positive.
    """
    dataset, backbone = student.dataset, student.backbone
    if not 0 <= user < dataset.n_users:
        raise ConfigError(f"user is {user}; {dataset.name} has the users 0 to {dataset.n_users - 1:,}")
    if k < 1:
        raise ConfigError(f"k is {k}; at least one item must be asked for")
    tables = student.tables()
    items = top_lists(tables, seen_items(dataset), np.array([user]), k)[0][0]
    joint = _margins(tables, user, items)
    without = {m: _margins(student.tables(backbone.without(m)), user, items) for m in backbone.modalities}
    return [
        Recommendation(int(item), float(joint[place]), {m: float(joint[place] - margins[place]) for m, margins in without.items()})
        for place, item in enumerate(items)
    ]


def top_lists(embeddings: Embeddings, seen: Interactions, users: np.ndarray, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The k best items of some users and their scores, without what they have seen.

    Returns:
        Items and scores of each user, best first; lists are shorter where fewer items are left.
    """
    lists, scores = [], []
    for chunk, top in top_items(embeddings, seen, users, k):
        known = seen.contains(chunk[:, None], top)
        rows = embeddings.users[torch.from_numpy(chunk).to(embeddings.users.device)]  # (b, d)
        columns = embeddings.items[torch.from_numpy(top).to(embeddings.items.device)]  # (b, k, d)
        values = torch.einsum("bd,bkd->bk", rows, columns).cpu().numpy()
        for row in range(len(chunk)):
            lists.append(top[row][~known[row]])
            scores.append(values[row][~known[row]])
    return lists, scores


def _margins(embeddings: Embeddings, user: int, items: np.ndarray) -> np.ndarray:
    """s(u,i) - mean_j s(u,j) for some items; constants of a user cancel."""
    centred = embeddings.items[torch.from_numpy(items).to(embeddings.items.device)] - embeddings.items.mean(dim=0)
    return (centred @ embeddings.users[user]).double().cpu().numpy()
