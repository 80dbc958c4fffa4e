"""The layout of LATTICE's data and its successors: ``5-core/{train,val,test}.json`` and ``<modality>_feat.npy`` beside that folder.

The project's own layout is the same without the folder. Ids from ``item_list.txt`` and ``user_list.txt`` ("id<TAB>number" a line) or
``item2id.json`` are kept where they are there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.draft import Draft
from ckd_fed.data.importers.positional import draft_by_position, feature_files
from ckd_fed.data.interactions import read_split_file
from ckd_fed.errors import DataError

_CORE = re.compile(r"[0-9]+-core")


def core_folders(directory: Path) -> list[Path]:
    """Folders with split files: ``*-core`` in the directory, or the directory itself."""
    cores = [path for path in sorted(directory.glob("*-core")) if _CORE.fullmatch(path.name) and (path / "train.json").is_file()]
    return [*cores, *([directory] if (directory / "train.json").is_file() else [])]


def read_lattice(directory: Path) -> Draft:
    """Read the layout; the directory may be the dataset's or one of its ``*-core`` folders.

    Raises:
        DataError: anything missing, damaged or ambiguous.
    """
    folders = core_folders(directory)
    if len(folders) > 1:
        raise DataError(f"{directory} has several splits ({', '.join(path.name for path in folders)}); name the folder of one, {folders[0]} say")
    if not folders:
        raise DataError(f"{directory} has no train.json, nor a folder such as 5-core with one")
    folder = folders[0]
    beside = folder.parent if _CORE.fullmatch(folder.name) else folder
    paths = [folder / f"{split}.json" for split in SPLITS]
    parts = {split: read_split_file(path) for split, path in zip(SPLITS, paths, strict=True)}
    items, item_sources = _names(folder, beside, "item")
    users, user_sources = _names(folder, beside, "user")
    return draft_by_position(
        "lattice",
        parts,
        feature_files(beside),
        rule={"rule": "as published"},
        sources=[*paths, *item_sources, *user_sources],
        user_names=users,
        item_names=items,
    )


def _names(folder: Path, beside: Path, kind: str) -> tuple[dict[int, str], list[Path]]:
    """Number -> id, from whichever list is there."""
    for directory in dict.fromkeys((folder, beside)):
        listed, mapped = directory / f"{kind}_list.txt", directory / f"{kind}2id.json"
        if listed.is_file():
            return _inverted(listed, _read_list(listed)), [listed]
        if mapped.is_file():
            try:
                table = json.loads(mapped.read_bytes())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{mapped} is damaged: {error}") from None
            if not isinstance(table, dict) or not all(type(number) is int for number in table.values()):
                raise DataError(f'{mapped}: {{"id": number}} is needed')
            return _inverted(mapped, list(table.items())), [mapped]
    return {}, []


def _read_list(path: Path) -> list[tuple[str, int]]:
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        name, tab, index = line.rpartition("\t")
        if not tab or not (index.isascii() and index.isdecimal()):
            if number == 1:
                continue  # a header, such as "org_id<TAB>remap_id"
            raise DataError(f"{path}, line {number}: {line[:60]!r} is no id, tab and number")
        pairs.append((name, int(index)))
    return pairs


def _inverted(path: Path, pairs: list[tuple[str, int]]) -> dict[int, str]:
    table = {number: name for name, number in pairs}
    if len(table) != len(pairs):
        seen: set[int] = set()
        twice = next(number for _, number in pairs if number in seen or seen.add(number))  # type: ignore[func-returns-value]
        raise DataError(f"{path} gives the number {twice} to two ids")
    return table
