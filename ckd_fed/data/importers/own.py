"""One's own files: a table of interactions and feature tables, brought together by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.draft import Draft, ModalityDraft
from ckd_fed.data.importers.tables import ITEM_NAMES, TEXT_ENDINGS, USER_NAMES, InteractionTable, header, read_interactions
from ckd_fed.data.importers.vectors import ENDINGS, align, modality_of, read_vectors, sidecar
from ckd_fed.data.splits import DEFAULT_SEED, split
from ckd_fed.errors import DataError


@dataclass(frozen=True)
class Options:
    """What the user says about files that do not say it themselves; empty means by the usual names.

    Attributes:
        user_column, item_column, time_column, split_column: of the interactions.
        id_column: of the feature tables.
        rule: split rule; empty for the split column, or random where there is none.
        seed: of the rule.
        rows_are_ids: row k of a feature file without ids belongs to the item with the id k.
    """

    user_column: str = ""
    item_column: str = ""
    time_column: str = ""
    split_column: str = ""
    id_column: str = ""
    rule: str = ""
    seed: int = DEFAULT_SEED
    rows_are_ids: bool = False


def sorted_ids(ids: Sequence[str]) -> list[str]:
    """Distinct ids in order: by number if all are plain whole numbers, else by text. The order of the rows carries no meaning."""
    distinct = set(ids)
    plain = all(name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0") for name in distinct)
    return sorted(distinct, key=int) if plain else sorted(distinct)


def sort_files(paths: Sequence[Path], options: Options, named: Sequence[Path] = ()) -> tuple[Path, dict[str, Path]]:
    """Tell the interactions from the feature tables: the interactions are the table with a user and an item column.

    Args:
        paths: the files.
        options: see there.
        named: feature files whose modality the user gave; they and their lists of ids are passed over.

    Raises:
        DataError: no or several tables of interactions, or two files for one modality.
    """
    interactions: list[Path] = []
    features: dict[str, Path] = {}
    tables: dict[Path, tuple[str, ...]] = {}
    lists = [place for path in (*paths, *named) if (place := sidecar(path)) is not None]
    passed = {path.absolute() for path in (*named, *lists)}
    for path in paths:
        if path.absolute() in passed:
            continue
        if path.suffix in (*TEXT_ENDINGS, ".parquet"):
            tables[path] = header(path)
            names = {name.lower() for name in tables[path]}
            user = {options.user_column.lower()} if options.user_column else set(USER_NAMES)
            item = {options.item_column.lower()} if options.item_column else set(ITEM_NAMES)
            if names & user and names & item:
                interactions.append(path)
                continue
        if path.suffix not in ENDINGS:
            raise DataError(f"{path} is none of the kinds of file that are read ({', '.join(ENDINGS)})")
        modality = modality_of(path)
        if modality in features:
            raise DataError(f"{features[modality]} and {path} are both for the modality {modality!r}; name them with --features MODALITY=FILE")
        features[modality] = path
    if not interactions:
        _check_named_columns(tables, options)
    if len(interactions) != 1:
        seen = ", ".join(_shown(path, tables.get(path, ())) for path in paths) or "no files"
        found = ", ".join(path.name for path in interactions) or f"none of {seen}"
        raise DataError(
            f"{len(interactions)} tables of interactions ({found}); exactly one file with a user and an item column is needed "
            "(name the columns with --user-column and --item-column)"
        )
    return interactions[0], features


def _check_named_columns(tables: Mapping[Path, Sequence[str]], options: Options) -> None:
    """A column of users or items that was named is in some table."""
    present = {name.lower() for names in tables.values() for name in names}
    for option, column in {"--user-column": options.user_column, "--item-column": options.item_column}.items():
        if column and column.lower() not in present:
            shown = ", ".join(_shown(path, names) for path, names in tables.items()) or "there is no table"
            raise DataError(f"{option} is {column!r}, and no table has a column of that name: {shown}")


def _shown(path: Path, columns: Sequence[str]) -> str:
    """A file with the columns that it has."""
    return f"{path.name} (columns: {', '.join(columns)[:200]})" if columns else path.name


def read_own(interactions: Path, features: Mapping[str, Path], options: Options) -> Draft:
    """Read interactions and features and bring them together.

    Items are those with an interaction; an item without a vector lacks that modality.

    Args:
        interactions: the table.
        features: modality -> its file.
        options: see there.

    Raises:
        DataError: anything missing, damaged or contradictory.
    """
    if not features:
        raise DataError(f"{interactions} comes without features; name at least one feature table, for example image.npz")
    if options.rule and options.split_column:
        raise DataError(f"a split rule ({options.rule}) and a split column ({options.split_column}) were given; one of them decides")
    table = read_interactions(
        interactions,
        user_column=options.user_column,
        item_column=options.item_column,
        time_column=options.time_column,
        split_column=options.split_column,
        rule=options.rule,
    )
    user_ids, item_ids = sorted_ids(table.users), sorted_ids(table.items)
    parts, rule, notes = split_interactions(table, user_ids, item_ids, options.rule, options.seed)
    modalities = {}
    sources = [interactions]
    ids_from = {}
    for modality, path in features.items():
        vectors = read_vectors(path, options.id_column)
        ids_from[path.name] = vectors.ids_from
        matrix, mask, said = align(vectors, item_ids, options.rows_are_ids)
        del vectors  # one table's rows beside what is kept of all
        modalities[modality] = ModalityDraft(matrix, mask, path.name)
        notes += said
        sources += [path, *([place] if (place := sidecar(path)) is not None else [])]
    if options.id_column and options.id_column not in ids_from.values():
        named = ", ".join(f"{file} by {column!r}" for file, column in ids_from.items() if column)
        raise DataError(
            f"--id-column is {options.id_column!r}, where no feature table has its ids" + (f" (they go by others: {named})" if named else "")
        )
    return Draft("own", user_ids, item_ids, parts, modalities, rule, sources, notes)


def split_interactions(
    table: InteractionTable, user_ids: Sequence[str], item_ids: Sequence[str], rule: str, seed: int
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, Any], list[str]]:
    """Number the ids and split.

    Returns:
        Split -> users and items; the rule for the manifest; notes.

    Raises:
        DataError: a part would be empty.
    """
    user_of = {name: k for k, name in enumerate(user_ids)}
    item_of = {name: k for k, name in enumerate(item_ids)}
    users = np.array([user_of[name] for name in table.users], dtype=np.int64)
    items = np.array([item_of[name] for name in table.items], dtype=np.int64)
    notes = [f"{table.doubled:,} rows repeat a pair of user and item and were left out"] if table.doubled else []
    if table.parts is not None:
        part = table.parts
        about: dict[str, Any] = {"rule": "column"}
    else:
        part = split(rule or "random", users, items, table.times, seed)
        about = {"rule": rule or "random", **({} if rule == "temporal" else {"seed": seed})}
        few = int((np.bincount(users) < 3).sum())
        if few and about["rule"] in ("random", "leave-one-out"):
            notes.append(f"{few:,} users have fewer than three interactions, which all train")
    for k, name in enumerate(SPLITS):
        if not (part == k).any():
            raise DataError(f"the split leaves {name} empty ({len(part):,} interactions in all); every part needs some, choose another rule")
    return {name: (users[part == k], items[part == k]) for k, name in enumerate(SPLITS)}, about, notes
