"""How much a modality's features tell of what users choose, without training anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckd_fed.data.dataset import Dataset, dense_features

K = 20
_BLOCK_USERS = 128
_PRODUCTS = 1e11  # multiplications: some seconds on a CPU


@dataclass(frozen=True)
class Signal:
    """Content-neighbour recall of one modality.

    Attributes:
        recall: Recall@20 on validation of ranking items by their mean cosine similarity to the user's training items, 0 to 1.
        shuffled: the same with the features dealt to other items, the mean of several deals; what chance (and popularity) gives.
        error: standard error of ``recall - shuffled`` over users and deals; NaN with one user or one deal, which tell none.
        users: how many were ranked.
    """

    recall: float
    shuffled: float
    error: float
    users: int

    @property
    def carries(self) -> bool:
        """Whether the features do better than shuffled ones beyond two standard errors; not where there is no error to tell it by."""
        return self.recall > self.shuffled + 2 * self.error


def content_signal(dataset: Dataset, modality: str, *, max_users: int = 0, shuffles: int = 3, seed: int = 0) -> Signal | None:
    """Content-neighbour recall against that of shuffled features.

    Items that lack the modality take part with the mean features, which is what absent means everywhere else.

    Args:
        dataset: with the modality.
        modality: its name.
        max_users: users drawn from those with training and validation items; 0 for 500 to 5,000, as many as take some seconds.
        shuffles: deals of the features.
        seed: of both draws.

    Returns:
        The measurement, or None where no user has both training and validation items.
    """
    users = np.intersect1d(dataset.train.users, dataset.val.users)
    if not len(users):
        return None
    rng = np.random.default_rng(seed)
    max_users = max_users or int(np.clip(_PRODUCTS / (dataset.features[modality].size * (1 + shuffles)), 500, 5000))
    users = np.sort(rng.choice(users, max_users, replace=False)) if len(users) > max_users else users
    features = dense_features(dataset, modality)
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norm, out=np.zeros_like(features), where=norm > 0)  # (n_items, d)
    recalls = _recalls(dataset, unit, users)
    shuffled = np.stack([_recalls(dataset, unit[rng.permutation(len(unit))], users) for _ in range(shuffles)])  # (shuffles, n)
    return Signal(float(recalls.mean()), float(shuffled.mean()), _error(recalls, shuffled), len(users))


def _error(recalls: np.ndarray, shuffled: np.ndarray) -> float:
    """Standard error of the mean difference between recalls ``(n,)`` and those of several deals ``(shuffles, n)``; NaN where either is one."""
    if min(shuffled.shape) < 2:
        return float("nan")
    over_users = (recalls - shuffled.mean(axis=0)).var(ddof=1) / len(recalls)
    over_deals = shuffled.mean(axis=1).var(ddof=1) / len(shuffled)  # a deal is the same for all users, so that more users do not average it out
    return float(np.sqrt(over_users + over_deals))


def _recalls(dataset: Dataset, unit: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Recall@20 of each user, ``(n,)``."""
    recalls = []
    for start in range(0, len(users), _BLOCK_USERS):
        block = users[start : start + _BLOCK_USERS]
        own = [dataset.train.items[dataset.train.indptr[user] : dataset.train.indptr[user + 1]] for user in block]
        scores = np.stack([unit[items].mean(axis=0) for items in own]) @ unit.T  # (b, n_items)
        for row, items in zip(scores, own, strict=True):
            row[items] = -np.inf
        k = min(K, scores.shape[1])
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        found = dataset.val.contains(block[:, None], top).sum(axis=1)
        recalls.append(found / dataset.val.degree[block])
    return np.concatenate(recalls)
