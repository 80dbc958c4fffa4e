"""Split rules: which interactions train, which validate, which test.

All draws come from the counter-based generator of the triple stream, so a split is a function of (interactions, rule, seed) and nothing
else: the same on every machine, with any numpy, whatever the order of the rows in a file.
"""

from __future__ import annotations

import numpy as np

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.triples import derive_key, words
from ckd_fed.errors import DataError, unknown

TRAIN, VAL, TEST = range(len(SPLITS))
RULES = ("random", "leave-one-out", "temporal", "cold-items", "warm-and-cold")
TIMED = ("leave-one-out", "temporal")  # those that need times
DEFAULT_SEED = 123
RULE_WORDS = {
    "random": "per user at random: a tenth, rounded down but at least one, for validation and as many for test",
    "leave-one-out": "per user the last interaction for test and the one before for validation",
    "temporal": "the last tenth in time for test and the tenth before for validation",
    "cold-items": "a tenth of the items, with all their interactions, for validation and another tenth for test",
    "warm-and-cold": "a tenth of the items, with all their interactions, for validation and another tenth for test; of the others per user at "
    "random a tenth, rounded down but at least one, for each",
}


def split(rule: str, users: np.ndarray, items: np.ndarray, times: np.ndarray | None = None, seed: int = DEFAULT_SEED) -> np.ndarray:
    """Part of every interaction.

    Users with fewer than three interactions train only under ``random`` and ``leave-one-out``: one for each part would leave them none.
    Of a user's interactions at one time, under ``leave-one-out``, the seed decides which is the last.

    Args:
        rule: one of :data:`RULES`.
        users, items: ids from 0, shape ``(n,)``, every pair once.
        times: in any unit, shape ``(n,)``; needed by :data:`TIMED`.
        seed: of the draws.

    Returns:
        0, 1 or 2 for train, val and test, shape ``(n,)``.

    Raises:
        DataError: an unknown rule, or one that these interactions cannot be split by.
    """
    if rule not in RULES:
        raise DataError(unknown("split rule", rule, RULES))
    if rule in TIMED and times is None:
        raise DataError(f"the split rule {rule} needs the times of the interactions; give them, or choose random")
    if rule == "temporal" and times is not None:
        return _temporal(times)
    if rule == "cold-items":
        return _cold_items(rule, items, seed)
    if rule == "warm-and-cold":
        part = _cold_items(rule, items, seed)
        warm = part == TRAIN
        part[warm] = _per_user("random", users[warm], items[warm], times, seed)
        return part
    return _per_user(rule, users, items, times, seed)


def _draws(rule: str, seed: int, n: int) -> np.ndarray:
    return words(derive_key("ckd-split-rule-1", rule, seed), n)


def _per_user(rule: str, users: np.ndarray, items: np.ndarray, times: np.ndarray | None, seed: int) -> np.ndarray:
    by_pair = np.lexsort((items, users))  # words are dealt in this order, so the order of the rows carries no meaning
    word = np.empty(len(users), dtype=np.uint64)
    word[by_pair] = _draws(rule, seed, len(users))
    moments = times if rule == "leave-one-out" and times is not None else np.zeros(len(users))
    order = np.lexsort((word, moments, users))  # of interactions at one time, the seed decides
    degree = np.bincount(users)
    n = np.repeat(degree, degree)
    from_end = np.repeat(np.cumsum(degree), degree) - np.arange(len(users)) - 1  # 0 is the user's last
    held = np.where(n < 3, 0, 1 if rule == "leave-one-out" else np.maximum(1, n // 10))
    part = np.empty(len(users), dtype=np.int64)
    part[order] = np.where(from_end < held, TEST, np.where(from_end < 2 * held, VAL, TRAIN))
    return part


def _temporal(times: np.ndarray) -> np.ndarray:
    """Cut at two moments; interactions of one moment stay together, so that none of them can tell of another."""
    ordered = np.sort(times)
    first, second = ordered[len(times) * 8 // 10], ordered[len(times) * 9 // 10]
    part = np.where(times < first, TRAIN, np.where(times < second, VAL, TEST))
    for name, number in zip(SPLITS, np.bincount(part, minlength=3), strict=True):
        if not number:
            raise DataError(f"the split rule temporal leaves {name} empty: too many interactions have the same time; choose random")
    return part


def _cold_items(rule: str, items: np.ndarray, seed: int) -> np.ndarray:
    """The published cold-start protocol: a fifth of the items are held out, half of them for validation and half for test."""
    present = np.unique(items)
    held = len(present) // 5
    if held < 2:
        raise DataError(f"the split rule {rule} holds out a fifth of the items, and {len(present)} items are too few for that")
    drawn = present[np.argsort(_draws("cold-items", seed, len(present)), kind="stable")]
    part_of = np.zeros(int(present[-1]) + 1, dtype=np.int64)
    part_of[drawn[: held // 2]] = TEST
    part_of[drawn[held // 2 : held]] = VAL
    return part_of[items]
