"""The built-in stand-in for Amazon Baby: a small dataset generated from a seed where the real one is not at hand.

It has two modalities with a planted imbalance. Users and items have latent factors of two kinds; an item is chosen for its ``text``
factors, for its ``image`` factors, for its popularity and by chance. The text factors weigh twice as much and the text features
show them at full scale; the image features show theirs at a fifth of it, but say what the text does not. Both are noisy. So a
plain student has fitted its training triples with text before it has learnt image, and a distilled one gains from the image teacher.

Every node that generates it gets the same files bit for bit, whatever its hardware, BLAS or numpy: all draws come from the
counter-based generator of the triple stream and everything that decides a choice is an integer. Products of factors go through
float64 matrix multiplication for speed, where sums of integers below 2**53 are exact in any order.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.triples import derive_key, words
from ckd_fed.errors import DataError

VERSION = 1  # raise it whenever the files written change: older stand-ins are then regenerated
DEFAULT_SEED = 2024
MARKER = "standin.json"

_FACTORS = 4  # latent factors of each kind
_SIGMA = 256  # one standard deviation of a factor, in integer units
_UNIT = _SIGMA * _SIGMA * 2  # one standard deviation of an inner product of factors: 2 is the root of _FACTORS
_BLOCK_USERS = 512

_README = """\
This is GENERATED data, not Amazon Baby.

ckd_fed wrote it from seed {seed} (generator version {version}) as a stand-in for the real dataset, with a planted imbalance between
its two modalities: text is strong, image is weak but complementary. Users, items and features are fictitious, and numbers measured
on it say nothing about Amazon Baby. Delete the folder to have it written again.
"""


@dataclass(frozen=True)
class Modality:
    """How a modality shapes choices and how well its features show it.

    Attributes:
        name: of the modality.
        pull: percent; standard deviation of its part in a user's utility over items.
        dimension: of the features.
        noise: percent; standard deviation of the features' noise relative to that of their signal.
        scale: percent; standard deviation of the features' signal.
    """

    name: str
    pull: int
    dimension: int
    noise: int
    scale: int


@dataclass(frozen=True)
class Plan:
    """Sizes and strengths of the stand-in; percentages are integers so that nothing is rounded.

    Attributes:
        users, items: how many.
        least, most: interactions of a user before the rarest items are topped up; activity is a Pareto law of exponent 2 between.
        item_least: interactions every item has at least.
        popularity: percent; utility per unit of log popularity rank.
        chance: percent; standard deviation of the chance part of a user's utility.
    """

    users: int = 1200
    items: int = 800
    least: int = 5
    most: int = 100
    item_least: int = 3
    popularity: int = 14
    chance: int = 80
    text: Modality = Modality("text", pull=150, dimension=64, noise=240, scale=100)
    image: Modality = Modality("image", pull=75, dimension=128, noise=240, scale=20)


DEFAULT_PLAN = Plan()


def is_standin(directory: Path) -> bool:
    """Whether a dataset's folder is a stand-in, or was made of one."""
    return (directory / MARKER).is_file()


def generate_standin(directory: Path, seed: int = DEFAULT_SEED, plan: Plan = DEFAULT_PLAN) -> Path:
    """Write the stand-in unless it is there already.

    The files are written into a temporary folder beside ``directory``, which is then renamed: nobody ever sees half a dataset, and of
    several processes that race one wins and the others use its result. A stand-in of another seed or an older generator is replaced.

    Args:
        directory: where it belongs, in the layout that :func:`~ckd_fed.data.dataset.load_dataset` reads.
        seed: of everything drawn.
        plan: sizes and strengths; other than the default only for experiments.

    Returns:
        ``directory``.

    Raises:
        DataError: ``directory`` exists and is no stand-in, so that it is left alone.
    """
    marker = {"version": VERSION, "seed": seed, "plan": asdict(plan)}
    if _complete(directory, marker):
        return directory
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        _write(fresh, seed, plan, marker)
        with _lock(directory.parent):
            if _complete(directory, marker):  # another process was faster
                return directory
            _refuse_foreign(directory)
            if directory.exists():
                os.rename(directory, Path(temporary) / "old")
            os.rename(fresh, directory)
    return directory


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Exclude other processes from swapping datasets in a folder. The lock is the folder's own, so no file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # releases it


def _complete(directory: Path, marker: dict[str, object]) -> bool:
    """Whether the stand-in that ``marker`` describes is there, with all its files."""
    try:
        found = json.loads((directory / MARKER).read_bytes())
    except (OSError, ValueError):
        return False
    names = [*(f"{split}.json" for split in SPLITS), "text_feat.npy", "image_feat.npy"]
    return found == marker and all((directory / name).is_file() for name in names)


def _refuse_foreign(directory: Path) -> None:
    """Files that no generator wrote are never deleted; an empty folder may be taken."""
    try:
        found = sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise DataError(f"{directory} is a file; the stand-in dataset needs a folder there") from None
    if found and MARKER not in found and directory.is_dir():
        raise DataError(
            f"{directory} holds {found[0]} but no {MARKER}: it was not written by the stand-in generator and is left alone; choose another"
        )


def _write(directory: Path, seed: int, plan: Plan, marker: dict[str, object]) -> None:
    draws = _Draws(seed)
    latent = {m.name: draws.normal("item factors", m.name, shape=(plan.items, _FACTORS)) for m in (plan.text, plan.image)}
    users, items = _interactions(draws, plan, latent)
    part = _split(draws, users, items)
    for index, split in enumerate(SPLITS):
        mine = part == index
        _write_split(directory / f"{split}.json", users[mine], items[mine])
    for m in (plan.text, plan.image):
        np.save(directory / f"{m.name}_feat.npy", _features(draws, m, latent[m.name]))
    (directory / "README.txt").write_text(_README.format(seed=seed, version=VERSION))
    (directory / MARKER).write_text(json.dumps(marker, indent=1) + "\n")


class _Draws:
    """Named draws under a seed: each is a function of the seed and its name alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def words(self, *name: object, n: int) -> np.ndarray:
        """``(n,)`` uint64."""
        return words(derive_key("ckd-standin", self._seed, *name), n)

    def uniform(self, *name: object, n: int) -> np.ndarray:
        """``(n,)`` float64 in (0, 1], from the top 53 bits."""
        return ((self.words(*name, n=n) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def normal(self, *name: object, shape: tuple[int, ...]) -> np.ndarray:
        """Integers, about normal with mean 0 and standard deviation ``_SIGMA``: the sum of a word's four 16-bit quarters, scaled."""
        quarters = self.words(*name, n=math.prod(shape)).astype("<u8").view("<u2").reshape(-1, 4)
        centred = quarters.sum(axis=1, dtype=np.int64).reshape(shape) - 2 * 65535  # standard deviation 37837
        return centred // (37837 // _SIGMA)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right.T`` of integers, exactly: every partial sum is an integer far below 2**53."""
    return (left.astype(np.float64) @ right.astype(np.float64).T).astype(np.int64)


def _interactions(draws: _Draws, plan: Plan, latent: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All interactions: each user takes the items of highest utility, then each rare item goes to the users who like it most.

    Utility = popularity + text part + image part + chance, in integers.

    Returns:
        Users and items, ``(n,)`` int64 each, sorted by user.
    """
    activity = np.minimum(np.floor(plan.least / np.sqrt(draws.uniform("activity", n=plan.users))), plan.most).astype(np.int64)
    rank = np.argsort(draws.words("popularity", n=plan.items), kind="stable")
    harmonic = np.cumsum(1.0 / np.arange(1, plan.items + 1))  # the logarithm of the rank but for a constant, and in any libm
    popularity = np.rint((harmonic[-1] - harmonic[rank]) * (plan.popularity * _UNIT)).astype(np.int64)

    blocks = []
    for start in range(0, plan.users, _BLOCK_USERS):
        n = min(_BLOCK_USERS, plan.users - start)
        utility = popularity + draws.normal("chance", start, shape=(n, plan.items)) * (2 * _SIGMA * plan.chance)
        for m in (plan.text, plan.image):
            taste = draws.normal("user factors", m.name, start, shape=(n, _FACTORS))
            utility += _product(taste, latent[m.name]) * m.pull
        blocks.append(utility * plan.items + np.arange(plan.items))  # no two alike: no tie is left to the sorting algorithm
    utility = np.concatenate(blocks)

    order = np.argsort(-utility, axis=1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(plan.items)[None, :], axis=1)
    taken = place < activity[:, None]
    fans = np.argsort(place * plan.users + np.arange(plan.users)[:, None], axis=0)[: plan.item_least]  # (item_least, items)
    rare = np.flatnonzero(taken.sum(axis=0) < plan.item_least)
    taken[fans[:, rare], rare] = True
    users, items = np.nonzero(taken)
    return users, items


def _split(draws: _Draws, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Per user at random: a tenth for test and a tenth for validation, at least one each, the rest for training.

    Returns:
        Index into SPLITS of every interaction, ``(n,)``.
    """
    order = np.lexsort((items, draws.words("split", n=len(users)), users))
    degree = np.bincount(users)
    position = np.arange(len(users)) - np.repeat(np.cumsum(degree) - degree, degree)
    tenth = np.repeat(np.maximum(1, degree // 10), degree)
    part = np.empty(len(users), dtype=np.int64)
    part[order] = np.where(position < tenth, 2, np.where(position < 2 * tenth, 1, 0))
    return part


def _features(draws: _Draws, modality: Modality, latent: np.ndarray) -> np.ndarray:
    """Latent factors mixed at random into more dimensions, plus noise; ``(n_items, dimension)`` float16."""
    mixing = draws.normal("mixing", modality.name, shape=(modality.dimension, _FACTORS))
    noise = draws.normal("feature noise", modality.name, shape=(len(latent), modality.dimension)) * (2 * _SIGMA)
    signal = _product(latent, mixing) * 100 + noise * modality.noise
    return (signal * modality.scale / (_UNIT * 100 * 100)).astype(np.float16)


def _write_split(path: Path, users: np.ndarray, items: np.ndarray) -> None:
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    table = {str(users[start]): row.tolist() for start, row in zip(starts, np.split(items, starts[1:]), strict=True)}
    path.write_text(json.dumps(table))
