"""Feature tables: vectors with the ids of their items, from ``.npy``, ``.npz``, ``.safetensors``, parquet or CSV, and their alignment by id."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.data.features import open_npy
from ckd_fed.data.importers.tables import TEXT_ENDINGS, find_column, header, id_text, number, open_parquet, parquet_faults, text_rows
from ckd_fed.errors import DataError

ID_NAMES = ("item", "item_id", "itemid", "iid", "asin", "id", "ids", "item_ids")
_ARRAYS = ("features", "feature", "feat", "embeddings", "embedding", "vectors", "x")
_INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")  # what pandas calls an index without a name, in CSV and in parquet
_BATCH = 1024  # rows of a parquet file at a time
ENDINGS = (".npy", ".npz", ".safetensors", ".parquet", *TEXT_ENDINGS)


@dataclass(frozen=True)
class Vectors:
    """Vectors of items.

    Attributes:
        path: the file.
        ids: of the items, one a row; None if the file has none and rows are to be taken for ids.
        matrix: shape ``(rows, dimension)``, floats; NaN in a whole row where an item has no vector.
        notes: what was left out on reading, in words.
        ids_from: name of the column or array that the ids come from; empty where they are not in the file.
    """

    path: Path
    ids: list[str] | None
    matrix: np.ndarray
    notes: tuple[str, ...] = ()
    ids_from: str = ""


def sidecar(path: Path) -> Path | None:
    """The list of ids beside a file without any: ``<stem>_ids`` or ``<modality>_ids`` as ``.txt``, ``.json`` or ``.npy``."""
    stems = dict.fromkeys((path.stem, modality_of(path)))
    places = [path.with_name(f"{stem}_ids{ending}") for stem in stems for ending in (".txt", ".json", ".npy")]
    return next((place for place in places if place.is_file()), None)


def modality_of(path: Path) -> str:
    """The modality a file name speaks of: ``image_feat.npy``, ``image-features.parquet`` and ``image.csv`` are all image."""
    name = path.name.partition(".")[0] if path.suffix != ".npy" else path.stem
    for ending in ("feat", "feats", "features", "embeddings", "vectors"):
        for mark in "_-":
            if name.endswith(mark + ending):
                return name[: -len(ending) - 1]
    return name


def read_vectors(path: Path, id_column: str = "") -> Vectors:
    """Read a feature table.

    Raises:
        DataError: an unknown ending, a damaged file, no or doubtful ids, or anything that is no number.
    """
    reader: dict[str, Callable[[Path, str], Vectors]] = {
        ".npy": lambda file, _: Vectors(file, _sidecar_ids(file), open_npy(file)),
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".parquet": _read_parquet,
        **dict.fromkeys(TEXT_ENDINGS, _read_text),
    }
    if path.suffix not in reader:
        raise DataError(f"{path}: features are read from {', '.join(reader)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    vectors = reader[path.suffix](path, id_column)
    matrix = vectors.matrix
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu" or 0 in matrix.shape:
        raise DataError(f"{path} has shape {matrix.shape} and dtype {matrix.dtype}; a matrix of numbers with one row an item is needed")
    if vectors.ids is not None and len(vectors.ids) != len(matrix):
        raise DataError(f"{path} has {len(matrix):,} rows but {len(vectors.ids):,} ids; one id a row is needed")
    return vectors if matrix.dtype.kind == "f" else replace(vectors, matrix=matrix.astype(np.float32))


def align(vectors: Vectors, item_ids: Sequence[str], rows_are_ids: bool = False) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Put vectors into the order of a dataset's items.

    Args:
        vectors: as read.
        item_ids: of the dataset's items, in order.
        rows_are_ids: row k of a file without ids belongs to the item with the id "k"; only if asked for.

    Returns:
        Features ``(n_items, dimension)`` with zero rows where an item has none, mask ``(n_items,)`` bool, and notes in words.

    Raises:
        DataError: no ids, an id twice with different vectors, no item in common, or a NaN or infinite entry.
    """
    ids = vectors.ids
    if ids is None:
        if not rows_are_ids:
            raise DataError(
                f"{vectors.path} has no ids: put a list of them beside it ({vectors.path.stem}_ids.txt, one a line), "
                "or say --rows-are-ids if row k belongs to the item with the id k"
            )
        ids = [str(k) for k in range(len(vectors.matrix))]
    row_of: dict[str, int] = {}
    doubled = 0
    for row, name in enumerate(ids):
        first = row_of.setdefault(name, row)
        if first != row:
            if not np.array_equal(vectors.matrix[first], vectors.matrix[row], equal_nan=True):
                raise DataError(f"{vectors.path} has the item {name[:40]!r} twice, in rows {first + 1} and {row + 1}, with different vectors")
            doubled += 1
    rows = np.array([row_of.get(name, -1) for name in item_ids], dtype=np.int64)
    there = rows >= 0
    if not there.any():
        raise DataError(
            f"{vectors.path} has none of the {len(item_ids):,} items of the interactions: its ids look like {ids[0][:40]!r}, theirs like "
            f"{item_ids[0][:40]!r}; both must be of one kind"
        )
    features = np.zeros((len(item_ids), vectors.matrix.shape[1]), dtype=vectors.matrix.dtype)
    features[there] = vectors.matrix[rows[there]]
    bad = ~np.isfinite(features)
    empty = np.isnan(features).all(axis=1)
    partly = np.flatnonzero(bad.any(axis=1) & ~empty)
    if len(partly):
        item, column = int(partly[0]), int(np.flatnonzero(bad[partly[0]])[0])
        raise DataError(
            f"{vectors.path}: the item {item_ids[item][:40]!r} has {features[item, column]} in column {column + 1} ({len(partly):,} such items); "
            "a vector is there as a whole or not at all"
        )
    features[empty] = 0
    mask = there & ~empty
    if not mask.any():
        raise DataError(f"{vectors.path} has no vector for any item of the interactions: all of them are empty")
    notes = list(vectors.notes)
    name = vectors.path.name
    if not there.all():
        notes.append(
            f"{name}: {int((~there).sum()):,} of {len(item_ids):,} items have no row and are masked (first: {item_ids[int(np.argmin(there))]})"
        )
    if (there & empty).any():
        notes.append(f"{name}: {int((there & empty).sum()):,} items have an empty vector and are masked")
    if extra := len(row_of) - int(there.sum()):
        notes.append(f"{name}: {extra:,} rows belong to items without an interaction and were left out")
    if doubled:
        notes.append(f"{name}: {doubled:,} rows repeat another and were left out")
    return features, mask, notes


def _sidecar_ids(path: Path) -> list[str] | None:
    place = sidecar(path)
    if place is None:
        return None
    if place.suffix == ".npy":
        return _id_list(place, open_npy(place))
    try:
        text = place.read_text(encoding="utf-8-sig")
        names = json.loads(text) if place.suffix == ".json" else text.splitlines()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} cannot be read: {error}") from None
    if not isinstance(names, list):
        raise DataError(f"{place} holds a {type(names).__name__}; a list of ids is needed")
    ids = [id_text(place, "id", row, name).strip() for row, name in enumerate(names, 1)]
    if "" in ids:
        raise DataError(f"{place}, line {ids.index('') + 1}: an id is empty")
    return ids


def _id_list(path: Path, ids: np.ndarray) -> list[str]:
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS":
        raise DataError(f"{path}: the ids have shape {ids.shape} and dtype {ids.dtype}; a list of whole numbers or texts is needed")
    return [name.decode("utf-8", "replace") for name in ids.tolist()] if ids.dtype.kind == "S" else [str(name) for name in ids.tolist()]


def _pick(path: Path, names: Sequence[str], shapes: Mapping[str, int], id_column: str) -> tuple[str, str | None]:
    """Name of the matrix and of the ids among named arrays; ``shapes`` gives their numbers of axes.

    The column of ids that was named may be another table's: then the usual names count.
    """
    ids = find_column(path, names, id_column if id_column in names else "", ID_NAMES, "id", needed=False)
    others = [name for name in names if name != ids]
    matrices = [name for name in others if name.lower() in _ARRAYS] or [name for name in others if shapes[name] == 2]
    if len(matrices) != 1:
        raise DataError(f"{path} has {len(matrices)} arrays that could be the features (it has: {', '.join(names)}); call the one 'features'")
    return matrices[0], ids


def _read_npz(path: Path, id_column: str) -> Vectors:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, NotImplementedError, SyntaxError, MemoryError) as error:
        raise DataError(f"{path} is no readable .npz file ({type(error).__name__}); objects in it are never unpickled") from None
    except Exception as error:  # zlib.error, tokenize.TokenError and what else a damaged archive ends in
        raise DataError(f"{path} is no readable .npz file ({type(error).__name__})") from None
    features, ids = _pick(path, list(arrays), {name: array.ndim for name, array in arrays.items()}, id_column)
    return Vectors(path, _id_list(path, arrays[ids]) if ids else _sidecar_ids(path), arrays[features], ids_from=ids or "")


def _read_safetensors(path: Path, id_column: str) -> Vectors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            listed = (file.metadata() or {}).get("ids")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no readable .safetensors file: {' '.join(str(error).split())[:100]}") from None
    features, ids = _pick(path, list(arrays), {name: array.ndim for name, array in arrays.items()}, id_column)
    if ids and listed is not None and ids != id_column:
        raise DataError(f"{path} has ids in the tensor {ids!r} and in its metadata; say --id-column {ids} if the tensor's are meant")
    if ids:
        return Vectors(path, _id_list(path, arrays[ids]), arrays[features], ids_from=ids)
    if listed is None:
        return Vectors(path, _sidecar_ids(path), arrays[features])
    try:
        names = json.loads(listed)
    except ValueError as error:
        raise DataError(f"{path}: the ids in its metadata are no JSON list: {error}") from None
    if not isinstance(names, list):
        raise DataError(f"{path}: the ids in its metadata are no JSON list")
    return Vectors(path, [id_text(path, "id", row, name) for row, name in enumerate(names, 1)], arrays[features])


def _columns(path: Path, names: Sequence[str], id_column: str) -> tuple[int, list[int], tuple[str, ...]]:
    """Positions of the ids and of the vector's columns in a table, and notes: an index that pandas wrote beside them is no feature."""
    ids = names.index(str(find_column(path, names, id_column if id_column in names else "", ID_NAMES, "id")))
    others = [k for k in range(len(names)) if k != ids]
    index = [k for k in others if _INDEX.fullmatch(names[k])]
    if len(others) == len(index):
        raise DataError(f"{path} has no column but the ids")
    notes = tuple(f"{path.name}: the column {names[k]!r} is an index that pandas wrote and was left out" for k in index)
    return ids, [k for k in others if k not in index], notes


def _read_parquet(path: Path, id_column: str) -> Vectors:
    """Batch by batch into one array: a vector as a list of Python floats would take several times its memory."""
    import pyarrow

    at, keep, notes = _columns(path, header(path), id_column)
    file = open_parquet(path)
    columns, rows, kinds = [file.schema_arrow.field(k) for k in keep], file.metadata.num_rows, pyarrow.types
    lists = len(columns) == 1 and any(test(columns[0].type) for test in (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list))
    for column in columns:
        kind = column.type.value_type if lists else column.type
        if not (kinds.is_integer(kind) or kinds.is_floating(kind)):
            raise DataError(
                f"{path}: the column {column.name!r} holds {column.type}; numbers are needed in all columns but the ids, or one column of lists"
            )
    dtype = np.float64 if any(column.type == pyarrow.float64() for column in columns) else np.float32
    ids: list[str] = []
    matrix = np.empty((0, 0), dtype=dtype)
    with parquet_faults(path):
        for batch in file.iter_batches(_BATCH):
            start = len(ids)
            ids += [id_text(path, file.schema_arrow.names[at], row, value) for row, value in enumerate(batch.column(at).to_pylist(), start + 1)]
            if lists:
                block = _from_lists(path, ids[start:], batch.column(keep[0]), matrix.shape[1])
            else:
                block = np.stack([batch.column(k).to_numpy(zero_copy_only=False) for k in keep], axis=1)
            if not matrix.shape[1] and block.shape[1]:  # the first vector, and the rows without one before it
                matrix = _allocate(path, (rows, block.shape[1]), dtype)
                matrix[:start] = np.nan
            if matrix.shape[1]:
                matrix[start : len(ids)] = block
    return Vectors(path, ids, matrix, notes, file.schema_arrow.names[at])


def _allocate(path: Path, shape: tuple[int, int], dtype: type) -> np.ndarray:
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError):
        raise DataError(f"{path} claims {shape[0]:,} rows of {shape[1]:,} numbers, more than there is memory for; is it damaged?") from None


def _from_lists(path: Path, ids: Sequence[str], lists: Any, width: int) -> np.ndarray:
    """The vectors of a column of lists, NaN where there is none; all of one width, that of those before if it is not 0."""
    import pyarrow.compute as compute

    lengths = compute.fill_null(compute.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    there = np.flatnonzero(lengths)
    width = width or (int(lengths[there[0]]) if len(there) else 0)
    wrong = there[lengths[there] != width]
    if len(wrong):
        raise DataError(f"{path}: the item {ids[wrong[0]][:40]!r} has {lengths[wrong[0]]} numbers, those before have {width}")
    block = np.full((len(lengths), width), np.nan, dtype=np.float32)
    if len(there):
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as that
            block[there] = lists.take(there).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return block


def _read_text(path: Path, id_column: str) -> Vectors:
    names = header(path)
    at, keep, notes = _columns(path, names, id_column)
    rows = text_rows(path)
    next(rows)
    ids: list[str] = []
    blocks: list[np.ndarray] = []
    for line, cells in rows:
        name, row = cells[at].strip(), [cells[k] for k in keep]
        if not name:
            raise DataError(f"{path}, line {line}: {names[at]} is empty")
        ids.append(name)
        if not any(cell.strip() for cell in row):
            blocks.append(np.full(len(row), np.nan, dtype=np.float32))
            continue
        try:
            blocks.append(_from_cells(row))
        except ValueError:
            wrong = next(k for k, cell in enumerate(row) if not _is_number(cell))
            raise DataError(f"{path}, line {line}: {names[keep[wrong]]} is {row[wrong][:40]!r}; a number is needed") from None
    if not blocks:
        raise DataError(f"{path} has a header but no rows")
    return Vectors(path, ids, np.stack(blocks), notes, names[at])


def _from_cells(cells: Sequence[str]) -> np.ndarray:
    """The vector of a row; a cell that is no number is a ValueError."""
    if "_" in "".join(cells):  # see number(); a call of it for every cell would double the time
        raise ValueError("an underscore is part of no number")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as that
        return np.array(cells, dtype=np.float64).astype(np.float32)


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True
