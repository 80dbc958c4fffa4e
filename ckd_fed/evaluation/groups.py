"""Recall for groups of users (how active they are) and of items (how popular they are): for whom a model works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    The groups are those of all users and all held-out interactions; where the lists are of a share of the users, so are the numbers
    (:func:`merge_groups` brings shares together).

    Args:
        model: what the rows are labelled with.
        rankings: ranked lists of at least k items.
        train, held_out: the parts of the split.
        k: cut-off.

    Returns:
        Rows ``{"model", "kind": "users" or "items", "group", "n", "recall@k"}``; n counts users, or held-out interactions.
    """
    row_of = np.full(held_out.n_users, -1)
    row_of[rankings.users] = np.arange(len(rankings.users))
    recall = np.zeros(len(held_out.users))
    here = row_of[held_out.users] >= 0
    recall[here] = rankings.hits[:, :k].sum(axis=1) / rankings.n_relevant
    popularity = np.bincount(train.items, minlength=train.n_items)
    row = row_of[held_out.row]
    hit = (rankings.top[row, :k] == held_out.items[:, None]).any(axis=1) if len(rankings.users) else np.zeros(len(row), dtype=bool)
    kinds = {
        "users": (_thirds(train.degree[held_out.users], "items"), here, recall),
        "items": (_thirds(popularity[held_out.items], "users"), row >= 0, hit),
    }
    rows = []
    for kind, (groups, counted, values) in kinds.items():
        for label, mask in groups.items():
            own = values[mask & counted]
            rows.append({"model": model, "kind": kind, "group": label, "n": len(own), f"recall@{k}": float(own.mean()) if len(own) else 0.0})
    return rows


def merge_groups(shares: Iterable[Iterable[Mapping[str, Any]]], k: int = 20) -> list[dict[str, Any]]:
    """The rows of :func:`group_rows` over all users, from those of each share."""
    merged: dict[tuple[str, str, str], dict[str, Any]] = {}
    for rows in shares:
        for row in rows:
            whole = merged.setdefault((row["model"], row["kind"], row["group"]), {**row, "n": 0, f"recall@{k}": 0.0})
            n = whole["n"] + row["n"]
            if n:
                whole[f"recall@{k}"] = (whole[f"recall@{k}"] * whole["n"] + row[f"recall@{k}"] * row["n"]) / n
            whole["n"] = n
    return list(merged.values())


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
