"""User-item interactions as a compressed row matrix of item ids, and the strict reading of the split files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ckd_fed.errors import DataError

_PLAIN_ID = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True)
class Interactions:
    """Items of every user, ascending, in CSR form.

    Attributes:
        indptr: shape ``(n_users + 1,)`` int64; the items of user u are ``items[indptr[u]:indptr[u + 1]]``.
        items: shape ``(n,)`` int64, ascending within a user.
        n_items: number of items that exist.
    """

    indptr: np.ndarray
    items: np.ndarray
    n_items: int

    @classmethod
    def from_pairs(cls, users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> Interactions:
        """Build from two equally long id arrays in any order."""
        order = np.lexsort((items, users))
        counts = np.bincount(users, minlength=n_users)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(indptr, np.ascontiguousarray(items[order], dtype=np.int64), n_items)

    @property
    def n_users(self) -> int:
        return len(self.indptr) - 1

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def degree(self) -> np.ndarray:
        """Items of each user, shape ``(n_users,)``."""
        return np.diff(self.indptr)

    @cached_property
    def row(self) -> np.ndarray:
        """User of each entry, shape ``(n,)``."""
        return np.repeat(np.arange(self.n_users), self.degree)

    @cached_property
    def users(self) -> np.ndarray:
        """Users that have at least one item, ascending."""
        return np.flatnonzero(self.degree)

    @cached_property
    def keys(self) -> np.ndarray:
        """``user * n_items + item`` of every entry, ascending: membership is one binary search."""
        return self.row * self.n_items + self.items

    def of_items(self, mask: np.ndarray) -> Interactions:
        """Only those with some items; users and item ids stay as they are.

        Args:
            mask: which items, ``(n_items,)`` bool.
        """
        kept = mask[self.items]
        return Interactions.from_pairs(self.row[kept], self.items[kept], self.n_users, self.n_items)

    def of_sampled_users(self, n: int, seed: int) -> Interactions:
        """Only those of n users with items, drawn without regard to anything; of all where there are no more. Ids stay as they are.

        Args:
            n: how many users; 0 for all.
            seed: the same users for the same seed.
        """
        if not n or n >= len(self.users):
            return self
        drawn = np.zeros(self.n_users, dtype=bool)
        drawn[np.random.Generator(np.random.PCG64(seed)).permutation(self.users)[:n]] = True
        kept = drawn[self.row]
        return Interactions.from_pairs(self.row[kept], self.items[kept], self.n_users, self.n_items)

    @cached_property
    def warm(self) -> np.ndarray:
        """Which items have an interaction, ``(n_items,)`` bool; the others are cold."""
        return np.bincount(self.items, minlength=self.n_items) > 0

    def contains(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each pair is an interaction; the arguments are broadcast against each other."""
        wanted = np.asarray(users, dtype=np.int64) * self.n_items + items
        if not len(self.keys):
            return np.zeros(wanted.shape, dtype=bool)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return self.keys[at] == wanted


def read_split_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one ``{"user id": [item ids]}`` file.

    Returns:
        Users and items, two int64 arrays of one entry an interaction. Users without items are simply absent.

    Raises:
        DataError: missing or damaged file, ids that are no non-negative integers, a user listed twice or an item twice for a user.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; a dataset needs train.json, val.json and test.json")

    def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{path}: user {twice if twice.isalnum() else ascii(twice)} is listed twice")
        return table

    try:
        table = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise DataError(f"{path} is damaged or truncated: {error}") from None
    if not isinstance(table, dict):
        raise DataError(f'{path} holds a {type(table).__name__}; {{"user id": [item ids]}} is needed')
    users: list[int] = []
    items: list[int] = []
    for key, row in table.items():
        if not _PLAIN_ID.fullmatch(key):
            raise DataError(f"{path}: user id {key[:40]!r} is not a plain non-negative integer")
        if len(key) > 15:
            raise DataError(f"{path}: user id {key[:40]} is out of range; ids run from 0 without gaps")
        if not isinstance(row, list) or not all(type(item) is int for item in row):
            raise DataError(f"{path}: the items of user {key} are {ascii(row)[:60]}; a list of integer item ids is needed")
        users.extend([int(key)] * len(row))
        items.extend(row)
    if not users:
        raise DataError(f"{path} is empty: it holds no interaction")
    if max(max(users), max(items)) >= 2**40 or min(items) < 0:
        worst = max(users) if max(users) >= 2**40 else (min(items) if min(items) < 0 else max(items))
        raise DataError(f"{path}: id {worst} is out of range; ids run from 0 without gaps")
    user_ids, item_ids = np.array(users, dtype=np.int64), np.array(items, dtype=np.int64)
    order = np.lexsort((item_ids, user_ids))
    repeated = (np.diff(user_ids[order]) == 0) & (np.diff(item_ids[order]) == 0)
    if repeated.any():
        at = order[np.flatnonzero(repeated)[0]]
        raise DataError(
            f"{path}: user {user_ids[at]} has item {item_ids[at]} twice ({int(repeated.sum())} doubled in all); list each interaction once"
        )
    return user_ids, item_ids
