"""MMRec's layout: one ``<name>.inter`` table with ``userID``, ``itemID`` and ``x_label`` (0 train, 1 val, 2 test), and ``<modality>_feat.npy``.

Ids are row numbers. ``i_id_mapping.csv`` and ``u_id_mapping.csv`` give the original ids where they are there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.draft import Draft
from ckd_fed.data.importers.positional import draft_by_position, feature_files
from ckd_fed.data.importers.tables import TextTable, read_text_table
from ckd_fed.errors import DataError


def read_mmrec(directory: Path) -> Draft:
    """Read the layout.

    Raises:
        DataError: anything missing, damaged or ambiguous.
    """
    inter = sorted(directory.glob("*.inter"))
    if len(inter) != 1:
        raise DataError(f"{directory} has {len(inter)} .inter files ({', '.join(path.name for path in inter) or 'none'}); exactly one is needed")
    table = read_text_table(inter[0])
    users, items, label = (_whole(table, name) for name in ("userID", "itemID", "x_label"))
    wrong = np.flatnonzero(label > 2)
    if len(wrong):
        raise DataError(f"{inter[0]}, line {table.lines[wrong[0]]}: x_label is {label[wrong[0]]}; 0 is train, 1 val and 2 test")
    order = np.lexsort((items, users))
    twice = np.flatnonzero((np.diff(users[order]) == 0) & (np.diff(items[order]) == 0))
    if len(twice):
        at = order[twice[0] + 1]
        raise DataError(f"{inter[0]}, line {table.lines[at]}: user {users[at]} has item {items[at]} twice ({len(twice):,} doubled in all)")
    parts = {split: (users[label == k], items[label == k]) for k, split in enumerate(SPLITS)}
    user_names, user_sources = _mapping(directory / "u_id_mapping.csv", "userID")
    item_names, item_sources = _mapping(directory / "i_id_mapping.csv", "itemID")
    return draft_by_position(
        "mmrec",
        parts,
        feature_files(directory),
        rule={"rule": "as published (x_label)"},
        sources=[inter[0], *user_sources, *item_sources],
        user_names=user_names,
        item_names=item_names,
    )


def _whole(table: TextTable, name: str) -> np.ndarray:
    """A column of whole numbers from 0."""
    texts = table.column(name)
    for line, text in zip(table.lines, texts, strict=True):
        if not (text.isascii() and text.isdecimal() and len(text) < 13):
            raise DataError(f"{table.path}, line {line}: {name} is {text[:40]!r}; a whole number from 0 is needed")
    return np.array(texts, dtype=np.int64)


def _mapping(path: Path, name: str) -> tuple[dict[int, str], list[Path]]:
    """Number -> original id, from a table of two columns of which one is called ``name``."""
    if not path.is_file():
        return {}, []
    table = read_text_table(path)
    other = [column for column in table.names if column != name]
    if name not in table.names or len(other) != 1:
        raise DataError(f"{path} has the columns {', '.join(table.names)}; {name} and one for the original id are needed")
    numbers = _whole(table, name).tolist()
    if len(set(numbers)) != len(numbers):
        raise DataError(f"{path} gives one {name} to two ids")
    return dict(zip(numbers, table.column(other[0]), strict=True)), [path]
