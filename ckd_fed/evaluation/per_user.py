"""What the test says of every single user: the ranked list and the metrics that the means are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.interactions import Interactions
from ckd_fed.evaluation.metrics import RankingMetrics, user_values
from ckd_fed.evaluation.ranking import top_items


@dataclass(frozen=True)
class UserRankings:
    """Ranked lists of the users that have held-out items.

    Attributes:
        users: ``(n,)`` int64, ascending.
        top: ``(n, K)`` int64, the best items of each user's list, training items left out; K = min(cut-off, number of items).
        hits: ``(n, K)`` bool, which of them are held out.
        n_relevant: ``(n,)``, held-out items of each user.
    """

    users: np.ndarray
    top: np.ndarray
    hits: np.ndarray
    n_relevant: np.ndarray

    def metrics(self, ks: Sequence[int]) -> dict[str, np.ndarray]:
        """``recall@20`` and the like -> one value a user, ``(n,)`` float32; their means are the run's test metrics."""
        return {name: values.astype(np.float32) for name, values in user_values(self._padded(ks), self.n_relevant, ks).items()}

    def means(self, ks: Sequence[int]) -> RankingMetrics:
        """The same over all users, as :func:`~ckd_fed.evaluation.ranking.evaluate` gives it."""
        metrics = RankingMetrics(tuple(sorted(ks)))
        metrics.update(self._padded(ks), self.n_relevant)
        return metrics

    def _padded(self, ks: Sequence[int]) -> np.ndarray:
        """Fewer items than K: the lists end early."""
        return np.pad(self.hits, ((0, 0), (0, max(0, max(ks) - self.hits.shape[1]))))


def rank_users(embeddings: Embeddings, train: Interactions, held_out: Interactions, k: int, share: tuple[int, int] = (0, 1)) -> UserRankings:
    """Rank all items for every user with held-out items, or a share of them; see :func:`~ckd_fed.evaluation.ranking.evaluate`."""
    worker, workers = share
    users = held_out.users[worker::workers]
    blocks = [top for _, top in top_items(embeddings, train, users, k)]
    top = np.concatenate(blocks) if blocks else np.zeros((0, min(k, train.n_items)), dtype=np.int64)
    return UserRankings(users, top, held_out.contains(users[:, None], top), held_out.degree[users])
