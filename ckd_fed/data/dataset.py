"""A dataset on disk: three split files and one feature file per modality, checked as a whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ckd_fed.data.features import features_fingerprint, load_features, load_mask
from ckd_fed.data.interactions import Interactions, read_split_file
from ckd_fed.data.manifest import verify
from ckd_fed.errors import DataError, unknown

SPLITS = ("train", "val", "test")
_SUFFIX = "_feat.npy"


@dataclass(frozen=True)
class Dataset:
    """One recommendation dataset, split and with its item features.

    Attributes:
        name: what outputs call it.
        directory: where it lives.
        train, val, test: interactions of the three parts.
        features: modality -> memory-mapped features, shape ``(n_items, dimension of that modality)``.
        masks: modality -> which items have it, shape ``(n_items,)`` bool; a modality that all items have is absent here.
        standin: whether this is generated data rather than the set it stands in for.
    """

    name: str
    directory: Path
    train: Interactions
    val: Interactions
    test: Interactions
    features: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]
    standin: bool = False

    @property
    def n_users(self) -> int:
        return self.train.n_users

    @property
    def n_items(self) -> int:
        return self.train.n_items

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @cached_property
    def user_ids(self) -> list[str]:
        """The source's ids of the users, in order; their numbers as text where the dataset has no ``users.json``."""
        return _source_ids(self.directory / "users.json", self.n_users)

    @cached_property
    def item_ids(self) -> list[str]:
        """The source's ids of the items, in order; their numbers as text where the dataset has no ``items.json``."""
        return _source_ids(self.directory / "items.json", self.n_items)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the split: equal on two nodes exactly if they hold the same interactions in the same parts."""
        digest = hashlib.sha256(f"ckd-split-1 {self.n_users} {self.n_items}".encode())
        for split in (self.train, self.val, self.test):
            digest.update(split.indptr.astype("<i8").tobytes())
            digest.update(split.items.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def feature_fingerprints(self) -> dict[str, str]:
        """Modality -> sha256 of its features, and where it has one of its mask: equal on two nodes exactly if they hold the same."""
        found = {m: features_fingerprint(matrix) for m, matrix in self.features.items()}
        return {m: f"{whole}+{hashlib.sha256(self.masks[m].tobytes()).hexdigest()}" if m in self.masks else whole for m, whole in found.items()}

    def of_modalities(self, modalities: Sequence[str]) -> Dataset:
        """The same split with some of the modalities: what a teacher trains on."""
        features = {m: self.features[m] for m in modalities}
        return replace(self, features=features, masks={m: mask for m, mask in self.masks.items() if m in features})

    def describe(self) -> str:
        """One line: users, items, interactions, modalities with their dimensions."""
        shapes = ", ".join(f"{name} {matrix.shape[1]}-d" for name, matrix in self.features.items())
        return (
            f"{self.name}: {self.n_users:,} users, {self.n_items:,} items, "
            f"{len(self.train):,}/{len(self.val):,}/{len(self.test):,} train/val/test interactions; {shapes}"
        )


def modalities_in(directory: Path) -> tuple[str, ...]:
    """Modalities whose feature file is in a directory, sorted by name."""
    return tuple(sorted(path.name[: -len(_SUFFIX)] for path in directory.glob(f"*{_SUFFIX}") if not path.name.startswith(".")))


def check_modality(name: str) -> None:
    """A modality's name is part of file names and of torch's names of parameters.

    Raises:
        DataError: it cannot be.
    """
    from torch.nn import ModuleDict, ParameterDict

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or any(hasattr(kind, name) for kind in (ModuleDict, ParameterDict)):
        raise DataError(
            f"modality {name!r} cannot be used: a name of letters, digits, - and _ is needed that torch's modules do not use; rename its file, or "
            "import it as --features NAME=FILE"
        )


def load_dataset(
    directory: Path, *, name: str | None = None, modalities: Iterable[str] | None = None, at_least: int = 2, standin: bool = False
) -> Dataset:
    """Load and check a dataset.

    Args:
        directory: folder in the layout ``train.json``, ``val.json``, ``test.json``, ``<modality>_feat.npy`` and, optionally,
            ``<modality>_mask.npy``. Where a ``manifest.json`` is there, the files opened are held against it.
        name: name for outputs, by default the folder's.
        modalities: which modalities to open, in this order; by default all that are there. Other files are not touched: a teacher
            node opens one.
        at_least: modalities needed, 2 for a student and 1 for a teacher.
        standin: recorded in the result.

    Raises:
        DataError: anything missing, damaged or inconsistent, named in one line.
    """
    if not directory.is_dir():
        raise DataError(f"dataset directory {directory} does not exist")
    modalities = None if modalities is None else tuple(modalities)
    verify(directory, modalities)
    pairs = {split: read_split_file(directory / f"{split}.json") for split in SPLITS}
    n_users = 1 + max(int(users.max()) for users, _ in pairs.values())
    n_items = 1 + max(int(items.max()) for _, items in pairs.values())
    _check_contiguous(directory, pairs, n_users)

    available = modalities_in(directory)
    for modality in available:
        if not modality:
            raise DataError(f"{directory}: {_SUFFIX} has no modality in front of it ({modality!r}); name it <modality>{_SUFFIX}")
    wanted = modalities if modalities is not None else available
    for modality in wanted:
        if modality not in available:
            raise DataError(f"{directory}: {unknown('modality', modality, available or ['none: no *_feat.npy file here'])}")
    if len(set(wanted)) < at_least:
        raise DataError(
            f"{directory} offers {len(set(wanted))} modality ({', '.join(wanted) or 'none'}); a multimodal student needs at least {at_least}: "
            f"add another <modality>{_SUFFIX}"
        )
    _check_rows(directory, wanted, n_items, pairs)
    features = {modality: load_features(directory / f"{modality}{_SUFFIX}", n_items) for modality in wanted}
    masks = {modality: mask for modality in wanted if (mask := load_mask(directory / f"{modality}_mask.npy", n_items)) is not None}

    splits = {split: Interactions.from_pairs(users, items, n_users, n_items) for split, (users, items) in pairs.items()}
    _check_disjoint(directory, splits)
    full = splits["train"].degree >= n_items
    if full.any():
        raise DataError(f"{directory}: user {np.flatnonzero(full)[0]} has every item in train.json, so no negative item exists for it; leave it out")
    return Dataset(name or directory.name, directory, splits["train"], splits["val"], splits["test"], features, masks, standin)


def dense_features(dataset: Dataset, modality: str) -> np.ndarray:
    """Features as float32 with items that lack the modality set to the mean of those that have it.

    The mean row is what an absent modality is replaced by (the counterfactual), so an item without the modality behaves like one
    for which it is absent. Shape ``(n_items, dimension)``. Features that are float32 already and that every item has are the
    dataset's own, read-only: mapped from the file, in memory once for all processes of a machine.
    """
    mask = dataset.masks.get(modality)
    if mask is None:
        features = np.asarray(dataset.features[modality], dtype=np.float32).view()
        features.flags.writeable = False
        return features
    features = np.array(dataset.features[modality], dtype=np.float32)
    features[~mask] = features[mask].mean(axis=0, dtype=np.float64)
    return features


def _source_ids(path: Path, n: int) -> list[str]:
    if not path.is_file():
        return [str(k) for k in range(n)]
    try:
        ids = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(ids, list) or len(ids) != n:
        raise DataError(f"{path} must be a list of {n:,} ids")
    return [str(name) for name in ids]


def _check_contiguous(directory: Path, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], n_users: int) -> None:
    seen = np.unique(np.concatenate([users for users, _ in pairs.values()]))
    if len(seen) != n_users:
        gap = int(np.flatnonzero(seen != np.arange(len(seen)))[0])
        raise DataError(
            f"{directory}: user ids must run from 0 without gaps, but user {gap} is in no split while user {n_users - 1} is; renumber the users"
        )


def _check_rows(directory: Path, modalities: tuple[str, ...], n_items: int, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """An item id beyond every feature table is a bad id rather than a short table: say so, naming the user."""
    from ckd_fed.data.features import open_npy

    shapes = {modality: open_npy(directory / f"{modality}{_SUFFIX}").shape for modality in modalities}
    if any(len(shape) != 2 for shape in shapes.values()):
        return  # no table at all, which its own check says
    rows = {modality: shape[0] for modality, shape in shapes.items()}
    if not rows or max(rows.values()) >= n_items or len(set(rows.values())) > 1:
        return
    limit = max(rows.values())
    for split, (users, items) in pairs.items():
        beyond = np.flatnonzero(items >= limit)
        if len(beyond):
            raise DataError(
                f"{directory / (split + '.json')}: user {users[beyond[0]]} has item {items[beyond[0]]}, out of range: "
                f"the features have {limit:,} rows (ids 0 to {limit - 1}); {len(beyond)} such ids in this file"
            )


def _check_disjoint(directory: Path, splits: Mapping[str, Interactions]) -> None:
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        doubled = np.intersect1d(splits[first].keys, splits[second].keys)
        if len(doubled):
            user, item = divmod(int(doubled[0]), splits[first].n_items)
            raise DataError(
                f"{directory}: user {user} has item {item} in both {first}.json and {second}.json ({len(doubled)} such pairs); "
                "the parts must not overlap"
            )
