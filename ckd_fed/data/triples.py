r"""The triple stream: every node derives the same training triples, so that none of them ever travels.

Triples are a function of (split, seed, epoch, step) and nothing else. The generator is counter-based (SplitMix64's finaliser over a
hashed key) and uses integer arithmetic only, so the result is the same bit for bit whatever the hardware or the numpy version, and
any step can be computed without those before it.

Sampling (one step), as in the published protocol:

- ranking batch: B distinct users drawn from those with training items (with repetition only if B exceeds them), for each one of its
  training items i and one item j outside them;
- distillation batch: K users drawn the same way, and two items j, k drawn uniformly from all items.

Steps per epoch = floor(n_train / B) + 1.

Where compiled kernels are to be had a step is drawn by one of them (``ckd_fed/kernels/stream.c``), number for number the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import DataError

if TYPE_CHECKING:
    from ckd_fed.kernels import Kernels

_KEPT = 1 << 17  # longest counter that is kept for the next call
_MASK = 0xFFFFFFFFFFFFFFFF
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# One lane per independent draw of a step; further draws of users use the lanes from _MORE_USERS on.
_USERS, _POSITIVE, _NEGATIVE, _KD_USERS, _KD_J, _KD_K = range(6)
_MORE_USERS = 16


def mix_int(x: int) -> int:
    """:func:`mix64` of one Python integer; an array of one would take ten times as long, and a step needs eight."""
    x &= _MASK
    x = (x ^ (x >> 30)) * int(_MIX_1) & _MASK
    x = (x ^ (x >> 27)) * int(_MIX_2) & _MASK
    return x ^ (x >> 31)


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64-bit words with full avalanche.

    In place, and returned: passes over memory are what it costs.
    """
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= _MIX_1
    np.right_shift(x, np.uint64(27), out=shifted)
    x ^= shifted
    x *= _MIX_2
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return x


def derive_key(*parts: object) -> int:
    """64-bit key of anything printable, by sha256."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def words(key: int, n: int) -> np.ndarray:
    """The first n 64-bit words under a key, shape ``(n,)`` uint64."""
    return mix64((_counter if n <= _KEPT else _counter.__wrapped__)(n) + np.uint64(key))


@lru_cache(maxsize=16)
def _counter(n: int) -> np.ndarray:
    """1 to n times gamma, read-only."""
    counter = np.arange(1, n + 1, dtype=np.uint64) * _GAMMA
    counter.flags.writeable = False
    return counter


def below(word: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Map words to integers in ``[0, bound)`` by multiply-and-shift of their high half; the bias is under bound / 2**32."""
    scaled = word >> np.uint64(32)
    scaled *= np.asarray(bound, dtype=np.uint64)
    scaled >>= np.uint64(32)
    return scaled.view(np.int64)


def smallest(word: np.ndarray, n: int) -> np.ndarray:
    """Positions of the n smallest of uniformly distributed words, all different, in ascending order; ``(n,)`` int64.

    The n-th lies close to the n-th part of the range, so only the words around that are put in order; where it does not, all are.
    """
    share = n / len(word)
    spread = 6 * math.sqrt(share * (1 - share) / len(word))
    low, high = (np.uint64(min(max(int((share + side * spread) * 2**64), 0), _MASK)) for side in (-1, 1))
    found = np.flatnonzero(word <= high)
    least = word[found]
    near = least[least >= low]
    rank = n - 1 - (len(least) - len(near))
    if not 0 <= rank < len(near):
        return np.flatnonzero(word <= np.partition(word, n - 1)[n - 1])
    return found[least <= np.partition(near, rank)[rank]]


def first_distinct(numbers: np.ndarray, n: int) -> np.ndarray:
    """The n distinct ones that occur first, in ascending order; all that are distinct where those are fewer.

    Args:
        numbers: int64, from 0 and below 2**31; fewer than 2**32 of them.
    """
    keys = numbers << 32 | np.arange(len(numbers))  # one sort of plain integers; np.unique would sort their positions along
    keys.sort()
    value = keys >> 32
    first = np.append(True, value[1:] != value[:-1])[: len(keys)]
    value = value[first]
    if len(value) <= n:
        return value
    position = keys[first] & 0xFFFFFFFF
    return value[position <= np.partition(position, n - 1)[n - 1]]


@dataclass(frozen=True)
class StepTriples:
    """Triples of one step.

    Attributes:
        ranking: shape ``(3, B)`` int32, rows user, positive item i, negative item j.
        distillation: shape ``(3, K)`` int32, rows user, item j, item k; K may be 0.
    """

    ranking: np.ndarray
    distillation: np.ndarray


class TripleStream:
    """Deterministic triples of every epoch and step.

    Args:
        train: training interactions.
        fingerprint: of the split; two splits give unrelated streams.
        seed: the run's seed.
        batch_size: B, triples of the ranking batch.
        kd_batch_size: K, triples of the distillation batch; 0 for none (a teacher or a plain student). The ranking batches do not
            depend on K.
    """

    def __init__(self, train: Interactions, fingerprint: str, seed: int, batch_size: int, kd_batch_size: int = 0) -> None:
        if not len(train.users):
            raise DataError("no user has a training item; there is nothing to train on")
        self.train = train
        self.seed = seed
        self.batch_size = batch_size
        self.kd_batch_size = kd_batch_size
        self._key = ("ckd-triples-1", fingerprint, seed)

    @property
    def steps_per_epoch(self) -> int:
        """floor(n_train / B) + 1, as published."""
        return len(self.train) // self.batch_size + 1

    @cached_property
    def _compiled(self) -> Kernels | None:
        """The compiled kernels where there are any and the arrays are as these read them."""
        from ckd_fed.kernels import kernels  # imports torch, which whoever draws triples needs and whoever reads data does not

        arrays = (self.train.indptr, self.train.items, self.train.users)
        as_read = all(array.dtype == np.int64 and array.flags.c_contiguous for array in arrays) and self.train.n_items <= 2**31
        return kernels() if as_read and self.train.n_users <= 2**31 else None

    @cached_property
    def _gaps(self) -> np.ndarray:
        """Sorted keys ``user * (n_items + 1) + (items outside the user's below its k-th item)``: see :meth:`_negatives`."""
        train = self.train
        rank = np.arange(len(train)) - train.indptr[train.row]
        return train.row * (train.n_items + 1) + train.items - rank

    def step(self, epoch: int, step: int) -> StepTriples:
        """Triples of one step; ``epoch`` and ``step`` count from 0."""
        base = mix_int(derive_key(*self._key, epoch) + (step + 1) * int(_GAMMA))
        if self._compiled is not None:
            return StepTriples(*self._compiled.triples(base, self.train, self.batch_size, self.kd_batch_size))
        users = self._draw_users(base, _USERS, self.batch_size)
        degree = self.train.degree[users]
        positive = self.train.items[self.train.indptr[users] + below(self._lane(base, _POSITIVE, len(users)), degree)]
        negative = self._negatives(users, below(self._lane(base, _NEGATIVE, len(users)), self.train.n_items - degree))
        n = self.kd_batch_size
        kd_users = self._draw_users(base, _KD_USERS, n) if n else np.empty(0, dtype=np.int64)
        kd_items = [below(self._lane(base, lane, n), self.train.n_items) for lane in (_KD_J, _KD_K)]
        ranking = np.stack([users, positive, negative], dtype=np.int32, casting="same_kind")
        return StepTriples(ranking, np.stack([kd_users, *kd_items], dtype=np.int32, casting="same_kind"))

    def steps(self, epoch: int, share: tuple[int, int] = (0, 1)) -> Iterator[StepTriples]:
        """Triples of an epoch one step after the other, or of worker w's share of it: the steps congruent to w modulo W for ``share=(w, W)``."""
        worker, workers = share
        return (self.step(epoch, step) for step in range(worker, self.steps_per_epoch, workers))

    def epoch(self, epoch: int, share: tuple[int, int] = (0, 1)) -> list[StepTriples]:
        """:meth:`steps` all at once; 12 (B + K) bytes each."""
        return list(self.steps(epoch, share))

    def _negatives(self, users: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The rank-th item (from 0) that is not a training item of each user: exact, no rejection, no loop.

        With the user's items t_0 < t_1 < ..., t_k - k items below t_k are outside; so the wanted item is ``rank`` plus the number of
        k with t_k - k <= rank, and that count is one binary search in the sorted keys of all users.
        """
        found = np.searchsorted(self._gaps, users * (self.train.n_items + 1) + rank, side="right")
        return rank + found - self.train.indptr[users]

    def _draw_users(self, base: int, lane: int, n: int) -> np.ndarray:
        """n users with training items, distinct where possible, in ascending order (the order within a batch carries no meaning)."""
        pool = self.train.users
        if n > len(pool):
            return np.sort(pool[below(self._lane(base, lane, n), len(pool))])
        if 4 * n >= len(pool):  # dense: the n smallest of one word per user
            word = self._lane(base, lane, len(pool))  # all different: one counter each, mixed by a bijection
            return pool[smallest(word, n)]
        chosen = np.empty(0, dtype=np.int64)  # sparse: draw, keep first occurrences, draw again for what is missing
        attempt = lane
        while len(chosen) < n:
            chosen = first_distinct(np.concatenate([chosen, below(self._lane(base, attempt, n + n // 4 + 8), len(pool))]), n)
            attempt += _MORE_USERS
        return pool[chosen]

    @staticmethod
    def _lane(base: int, lane: int, n: int) -> np.ndarray:
        return words(mix_int(base ^ (lane + 1) * int(_MIX_1)), n)


def triples_hash(steps: list[StepTriples]) -> str:
    """sha256 of triples in order: binds a sheet of margins to them."""
    digest = hashlib.sha256()
    for triples in steps:
        digest.update(np.int64(triples.ranking.shape[1]).tobytes())
        digest.update(np.ascontiguousarray(triples.ranking, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(triples.distillation, dtype="<i4").tobytes())
    return digest.hexdigest()
