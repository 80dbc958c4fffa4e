"""Datasets of any size for measuring speed: drawn from a seed, without structure to learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ckd_fed.data.dataset import Dataset
from ckd_fed.data.interactions import Interactions

#: Users, items, training interactions and feature widths of Amazon Baby with the published features.
BABY = (19_445, 7_050, 119_674, {"image": 4096, "text": 384})


def made_up(n_users: int, n_items: int, n_train: int, widths: Mapping[str, int], seed: int = 0) -> Dataset:
    """Zipf-like items, log-normal user degrees of at least 1, about ``n_train`` training interactions; one in six is held out besides.

    Features are standard normal, float32. Nothing is written to disk.
    """
    generator = np.random.default_rng(seed)
    total = n_train + n_train // 3
    share = generator.lognormal(sigma=0.8, size=n_users)
    degree = 3 + generator.multinomial(max(0, total - 3 * n_users), share / share.sum())
    users = np.repeat(np.arange(n_users), degree)
    rank = (n_items ** generator.random(len(users))).astype(np.int64) - 1  # density ~ 1 / rank
    items = generator.permutation(n_items)[np.clip(rank, 0, n_items - 1)]
    keys = np.unique(users * n_items + items)
    users, items = keys // n_items, keys % n_items
    part = generator.choice(3, size=len(users), p=(0.75, 0.125, 0.125))
    first = np.r_[True, users[1:] != users[:-1]]
    part[first] = 0  # every user trains
    train, val, test = (Interactions.from_pairs(users[part == p], items[part == p], n_users, n_items) for p in range(3))
    features = {m: generator.standard_normal((n_items, width), dtype=np.float32) for m, width in widths.items()}
    return Dataset(f"made up ({n_users:,} users)", Path(), train, val, test, features, {})
