"""A model's test: means, user by user, by groups, and of warm and cold items apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.interactions import Interactions
from ckd_fed.evaluation.groups import group_rows, merge_groups
from ckd_fed.evaluation.metrics import RankingMetrics
from ckd_fed.evaluation.per_user import UserRankings, rank_users
from ckd_fed.evaluation.ranking import evaluate

ENOUGH = 10  # cold items, in lengths of the longest list


@dataclass(frozen=True)
class UserTest:
    """The joint ranking, user by user.

    Attributes:
        users: ids of those tested, ``(n,)``, ascending.
        values: ``recall@20`` and the like -> ``(n,)`` float32.
        groups: rows of :func:`~ckd_fed.evaluation.groups.group_rows`.
    """

    users: np.ndarray
    values: Mapping[str, np.ndarray]
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class Tested:
    """What a test of one model gave.

    Attributes:
        metrics: of the joint ranking by their name; of other rankings prefixed (``only/m/``, ``calibrated/``, ``warm/``, ``cold/``).
        chosen: on validation, to read a student out; see :meth:`~ckd_fed.training.trainer.Trainer.read_out`.
        by_user: the joint ranking, user by user.
    """

    metrics: RankingMetrics
    chosen: Mapping[str, float]
    by_user: UserTest


def rank_test_users(
    model: str, embeddings: Embeddings, train: Interactions, test: Interactions, ks: Sequence[int], share: tuple[int, int] = (0, 1)
) -> UserTest:
    """Rank all items for every test user, or a share of them.

    Args:
        model: what the groups' rows are labelled with.
        embeddings: of the joint view.
        train, test: parts of the split.
        ks: cut-offs of the metrics; 20 among them.
        share: (w, W), see :func:`~ckd_fed.evaluation.ranking.evaluate`.
    """
    return user_test(model, rank_users(embeddings, train, test, max(ks), share), train, test, ks)


def user_test(model: str, rankings: UserRankings, train: Interactions, test: Interactions, ks: Sequence[int]) -> UserTest:
    """What ranked lists of at least ``max(ks)`` items say user by user; arguments as for :func:`rank_test_users`."""
    return UserTest(rankings.users, rankings.metrics(ks), group_rows(model, rankings, train, test))


def merge_shares(shares: Sequence[UserTest]) -> UserTest:
    """The test of all users from those of the workers' shares."""
    users = np.concatenate([share.users for share in shares])
    order = np.argsort(users, kind="stable")
    values = {name: np.concatenate([share.values[name] for share in shares])[order] for name in shares[0].values}
    return UserTest(users[order], values, merge_groups([share.groups for share in shares]))


def add_warm_and_cold(
    metrics: RankingMetrics, embeddings: Embeddings, train: Interactions, test: Interactions, share: tuple[int, int] = (0, 1)
) -> None:
    """Where the split holds items out of training, add ``cold/<metric>``: only such items compete, over the users that have one held out.

    And ``warm/<metric>``, the same of all other items, where the test has any. Ranked among all items, those never trained would mostly
    tell how far untrained embeddings happen to lie from trained ones. Fewer cold items than ten times the longest cut-off, as any random
    split leaves some, are passed over: a list that holds a good part of them says nothing.
    """
    warm = train.warm
    if warm[test.items].all() or (~warm).sum() < ENOUGH * max(metrics.ks):
        return
    for prefix, items in (("warm/", warm), ("cold/", ~warm)):
        if items[test.items].any():
            metrics.add(prefix, evaluate(embeddings, train, test, metrics.ks, share, items), own_users=True)
