"""What the published layouts share: ids that are row numbers, and features without ids of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.draft import Draft, ModalityDraft
from ckd_fed.data.features import load_mask, open_npy
from ckd_fed.errors import DataError

Pairs = tuple[np.ndarray, np.ndarray]
SUFFIX = "_feat.npy"


def feature_files(directory: Path) -> dict[str, Path]:
    """Modality -> its ``<modality>_feat.npy``; at least one.

    Raises:
        DataError: there is none.
    """
    found = {path.name[: -len(SUFFIX)]: path for path in sorted(directory.glob(f"*{SUFFIX}")) if path.name != SUFFIX}
    if not found:
        raise DataError(f"{directory} has no <modality>{SUFFIX}; put the features there, one row an item")
    return found


def draft_by_position(
    layout: str,
    parts: Mapping[str, Pairs],
    features: Mapping[str, Path],
    *,
    rule: dict[str, Any],
    sources: Sequence[Path],
    user_names: Mapping[int, str] | None = None,
    item_names: Mapping[int, str] | None = None,
    n_items: int | None = None,
) -> Draft:
    """A draft of interactions whose item ids are the rows of the feature files.

    Items keep their ids. Users who are in no part are left out, and so are the items after the last one with an interaction, for no part
    of a dataset would show that they exist; both are noted.

    Args:
        layout: its name.
        parts: split -> users and items.
        features: modality -> ``.npy`` file.
        rule: for the manifest.
        sources: files read besides the features.
        user_names, item_names: row number -> the source's id, where the source has id lists.
        n_items: number of items, where the source states it; otherwise all feature files must agree on it.

    Raises:
        DataError: a feature file is damaged or has another number of rows, or an id lies beyond them.
    """
    tables = {modality: open_npy(path) for modality, path in features.items()}
    for modality, table in tables.items():
        if table.ndim != 2 or table.dtype.kind != "f":
            raise DataError(
                f"{features[modality]} has shape {table.shape} and dtype {table.dtype}; a matrix of floats with one row an item is needed"
            )
    rows = {modality: len(table) for modality, table in tables.items()}
    n = n_items if n_items is not None else max(rows.values())
    for modality, number in rows.items():
        if number != n:
            against = "the interaction matrices have that many columns" if n_items is not None else "another feature file has that many"
            raise DataError(f"{features[modality]} has {number:,} rows, not {n:,} ({against}); item k's features must be row k")
    users_seen, n_used = _check_ids(parts, n)
    names = item_names or {}
    notes = []
    if n_used < n:
        notes.append(f"{n - n_used:,} items at the end of the features have no interaction and were left out")
    n_users = int(users_seen[-1]) + 1
    if len(users_seen) < n_users:
        notes.append(f"{n_users - len(users_seen):,} users are in no part; the others were renumbered")
    known = user_names or {}
    modalities = {}
    for modality, table in tables.items():
        mask_path = features[modality].with_name(f"{modality}_mask.npy")
        mask = load_mask(mask_path, n)
        modalities[modality] = ModalityDraft(table[:n_used], None if mask is None else mask[:n_used], features[modality].name)
        sources = [*sources, features[modality], *([mask_path] if mask is not None else [])]
    return Draft(
        layout,
        [known.get(int(user), str(user)) for user in users_seen],
        [names.get(item, str(item)) for item in range(n_used)],
        {split: (np.searchsorted(users_seen, users), items) for split, (users, items) in parts.items()},
        modalities,
        rule,
        list(sources),
        notes,
    )


def _check_ids(parts: Mapping[str, Pairs], n: int) -> tuple[np.ndarray, int]:
    """The users that occur, ascending, and one more than the greatest item."""
    for split, (users, items) in parts.items():
        if not len(users):
            raise DataError(f"the {split} part holds no interaction; all of {', '.join(SPLITS)} need some")
        beyond = np.flatnonzero(items >= n)
        if len(beyond):
            raise DataError(
                f"the {split} part: user {users[beyond[0]]} has item {items[beyond[0]]}, but the features have {n:,} rows (ids 0 to {n - 1}); "
                f"{len(beyond):,} such ids in this part"
            )
    users_seen = np.unique(np.concatenate([users for users, _ in parts.values()]))
    return users_seen, 1 + max(int(items.max()) for _, items in parts.values())
