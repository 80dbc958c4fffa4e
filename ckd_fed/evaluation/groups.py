"""Recall for groups of users (how active they are) and of items (how popular they are): for whom a model works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ckd_fed.data.interactions import Interactions
from ckd_fed.evaluation.per_user import UserRankings

GROUPS = 3


def group_rows(model: str, rankings: UserRankings, train: Interactions, held_out: Interactions, k: int = 20) -> list[dict[str, Any]]:
    """Recall@k of one model by group.

    Users are grouped by their training items and recall is averaged over the users of a group. Items are grouped by their training
    users, and a group's recall is the share of its held-out interactions that are found in the top k (a user has too few items of a
    group for a mean over users to mean anything).

    Args:
        model: what the rows are labelled with.
        rankings: ranked lists of at least k items.
        train, held_out: the parts of the split.
        k: cut-off.

    Returns:
        Rows ``{"model", "kind": "users" or "items", "group", "n", "recall@k"}``; n counts users, or held-out interactions.
    """
    found = rankings.hits[:, :k].sum(axis=1)
    activity = train.degree[rankings.users]
    rows = [
        {"model": model, "kind": "users", "group": label, "n": int(mask.sum()), f"recall@{k}": float((found / rankings.n_relevant)[mask].mean())}
        for label, mask in _thirds(activity, "items").items()
    ]
    popularity = np.bincount(train.items, minlength=train.n_items)
    row_of = np.full(held_out.n_users, -1)
    row_of[rankings.users] = np.arange(len(rankings.users))
    hit = (rankings.top[row_of[held_out.row], :k] == held_out.items[:, None]).any(axis=1)  # (held-out interactions,)
    rows += [
        {"model": model, "kind": "items", "group": label, "n": int(mask.sum()), f"recall@{k}": float(hit[mask].mean())}
        for label, mask in _thirds(popularity[held_out.items], "users").items()
    ]
    return rows


def _thirds(counts: np.ndarray, unit: str) -> Mapping[str, np.ndarray]:
    """Up to three groups of about equal size by a count, labelled with its range; equal counts stay together."""
    edges = np.unique(np.quantile(counts, np.arange(1, GROUPS) / GROUPS, method="inverted_cdf"))
    place = np.searchsorted(edges, counts)  # counts up to and including an edge lie below it
    groups = {}
    for number in np.unique(place):
        mask = place == number
        low, high = int(counts[mask].min()), int(counts[mask].max())
        groups[f"{low} {unit}" if low == high else f"{low} to {high} {unit}"] = mask
    return groups
