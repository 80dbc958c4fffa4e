"""Ranking metrics from a 0/1 hit matrix, streamed over blocks of users.

NDCG comes in two variants, never mixed:

- ``ndcg@K``: the standard one; the ideal DCG puts min(K, number of relevant items) hits first.
- ``ndcg_retrieved@K``: as the published code of LATTICE and CKD has it; the ideal order is that of the hits *retrieved* in the list
  of the largest K, so a user with one hit at rank 1 scores 1 however many items were missed. Only for comparison with their tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

METRIC = "recall@20"  # that training and every choice on validation go by
NAMES = ("recall", "ndcg", "precision", "hit_rate", "ndcg_retrieved")
_USERS = "users"


def cutoffs(names: Iterable[str]) -> list[int]:
    """The cut-offs that metrics of the joint view are of, ascending."""
    return sorted({int(name.removeprefix("recall@")) for name in names if name.startswith("recall@")})


@dataclass
class RankingMetrics:
    """Sums over users that can be updated block by block and merged between workers.

    Attributes:
        ks: cut-offs, ascending.
        sums: ``"recall@20"`` and the like -> sum over users. Those under a prefix that has a number of users of its own, ``"cold/users"``,
            are over as many.
        n_users: users counted.
    """

    ks: tuple[int, ...] = (10, 20)
    sums: dict[str, float] = field(default_factory=dict)
    n_users: int = 0

    def update(self, hits: np.ndarray, n_relevant: np.ndarray) -> None:
        """Add a block of users.

        Args:
            hits: ``(n, max(ks))`` bool, whether the item at each rank is relevant.
            n_relevant: ``(n,)``, relevant items of each user, all positive.
        """
        for key, values in user_values(hits, n_relevant, self.ks).items():
            self.sums[key] = self.sums.get(key, 0.0) + float(values.sum())
        self.n_users += len(hits)

    def add(self, prefix: str, other: RankingMetrics, *, own_users: bool = False) -> None:
        """Put another ranking's sums beside these, their names prefixed; over the same users, or over some of them (``own_users``)."""
        self.sums.update({prefix + key: value for key, value in other.sums.items()})
        if own_users:
            self.sums[prefix + _USERS] = float(other.n_users)

    def merge(self, sums: Mapping[str, float], n_users: int) -> None:
        """Add another worker's sums."""
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.n_users += n_users

    def compute(self) -> dict[str, float]:
        """Means over users; empty if no user was counted."""
        found = {}
        for key, value in self.sums.items():
            prefix, _, name = key.rpartition("/")
            n = self.sums.get(f"{prefix}/{_USERS}", self.n_users)
            if n and name != _USERS:
                found[key] = value / n
        return found


def user_values(hits: np.ndarray, n_relevant: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Metrics of each user, ``(n,)`` each; arguments as for :meth:`RankingMetrics.update`."""
    discount = 1.0 / np.log2(np.arange(2, hits.shape[1] + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])  # ideal[n]: DCG of n hits at the top
    gains = np.cumsum(hits * discount, axis=1)
    counts = np.cumsum(hits, axis=1)
    retrieved = counts[:, -1]
    found: dict[str, np.ndarray] = {}
    for k in ks:
        dcg, hit = gains[:, k - 1], counts[:, k - 1]
        best_retrieved = ideal[np.minimum(retrieved, k)]
        values = {
            "recall": hit / n_relevant,
            "ndcg": dcg / ideal[np.minimum(n_relevant, k)],
            "precision": hit / k,
            "hit_rate": hit > 0,
            "ndcg_retrieved": np.divide(dcg, best_retrieved, out=np.zeros_like(dcg), where=best_retrieved > 0),
        }
        found.update({f"{name}@{k}": values[name] for name in NAMES})
    return found


def metric_keys(ks: Sequence[int]) -> tuple[str, ...]:
    """All metric keys for some cut-offs."""
    return tuple(f"{name}@{k}" for k in ks for name in NAMES)
