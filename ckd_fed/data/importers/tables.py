"""Interaction tables: CSV, TSV or parquet with a user and an item column, of any ids."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.data.splits import TIMED
from ckd_fed.errors import DataError, unknown

TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".inter")
USER_NAMES = ("user", "user_id", "userid", "uid", "reviewerid")
ITEM_NAMES = ("item", "item_id", "itemid", "iid", "asin")
TIME_NAMES = ("timestamp", "time", "unixreviewtime", "date", "datetime")
SPLIT_NAMES = ("split", "x_label")
_PARTS = {"train": 0, "training": 0, "0": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "1": 1, "test": 2, "testing": 2, "2": 2}


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        path: the file.
        names: of the columns.
        columns: name -> entries.
        lines: line of the file that each row ends on (in parquet: the row's number from 1).
    """

    path: Path
    names: tuple[str, ...]
    columns: dict[str, list[str]]
    lines: Sequence[int]

    def column(self, name: str) -> list[str]:
        """A column's entries.

        Raises:
            DataError: there is none of that name; the message lists them.
        """
        if name not in self.columns:
            raise DataError(f"{self.path}: {unknown('column', name, self.names)}")
        return self.columns[name]


def text_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a delimited file with their numbers, header first; blank lines are skipped.

    The delimiter is a tab in ``.tsv`` and ``.inter`` files, else whichever of comma, tab and semicolon the header has.

    Raises:
        DataError: no UTF-8, a NUL byte, an open quote or a row of another width than the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            mark = "\t" if path.suffix in (".tsv", ".inter") else next((mark for mark in ",\t;" if mark in header), ",")
            file.seek(0)
            reader = csv.reader(file, delimiter=mark, strict=True)
            width = 0
            for row in reader:
                if not row:
                    continue
                width = width or len(row)
                if len(row) != width:
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {width}")
                if "\0" in "".join(row):
                    raise DataError(f"{path}, line {reader.line_num}: a NUL character; the file is damaged or no UTF-8 text")
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (line {_line_of(path)}: {error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def _line_of(path: Path) -> int:
    """The line with the first byte that is no UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def header(path: Path) -> tuple[str, ...]:
    """Names of a table's columns, stripped."""
    if path.suffix == ".parquet":
        return tuple(open_parquet(path).schema_arrow.names)
    for _, row in text_rows(path):
        return tuple(name.strip() for name in row)
    raise DataError(f"{path} is empty; a header line and rows are needed")


def read_text_table(path: Path, wanted: Sequence[str] | None = None) -> TextTable:
    """Read a delimited file or the named columns of a parquet file as texts.

    Raises:
        DataError: a damaged file, a column name twice, no rows.
    """
    names = header(path)
    if len(set(names)) != len(names):
        raise DataError(_twice(path, next(name for name in names if names.count(name) > 1)))
    keep = [name for name in names if wanted is None or name in wanted]
    lines: Sequence[int]
    if path.suffix == ".parquet":
        with parquet_faults(path):
            table = open_parquet(path).read(columns=keep)
            columns = {name: [id_text(path, name, k, value) for k, value in enumerate(table[name].to_pylist(), 1)] for name in keep}
        lines = range(1, table.num_rows + 1)
    else:
        rows = text_rows(path)
        next(rows)
        positions = [names.index(name) for name in keep]
        kept: list[list[str]] = [[] for _ in keep]
        numbers = []
        for number, row in rows:
            numbers.append(number)
            for into, at in zip(kept, positions, strict=True):
                into.append(row[at].strip())
        columns, lines = dict(zip(keep, kept, strict=True)), numbers
    if not len(lines):
        raise DataError(f"{path} has a header but no rows")
    return TextTable(path, names, columns, lines)


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``; pyarrow is an extra.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(f"{path}: parquet needs pyarrow; install it with pip install 'ckd_fed[data]', or save the table as CSV") from None
    with parquet_faults(path):
        return parquet.ParquetFile(path)


@contextmanager
def parquet_faults(path: Path) -> Iterator[None]:
    """What reading a damaged parquet file ends in, or one with values that Python has no form for, as a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is no readable parquet file: {' '.join(str(error).split())[:120]}") from None


def id_text(path: Path, column: str, row: int, value: object) -> str:
    """An id as text: whole floats, which is what pandas makes of integers beside missing ones, as integers.

    Raises:
        DataError: no id at all, or a float so large that ids beside it may have become the same.
    """
    if isinstance(value, float) and not (math.isfinite(value) and value == int(value)):
        raise DataError(f"{path}, row {row}: {column} is {value}, which is no id")
    if isinstance(value, float) and abs(value) >= 2**53:
        raise DataError(f"{path}, row {row}: {column} is {value}; floats of this size do not tell neighbouring ids apart, write integers or texts")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, (bool, list, dict)):
        raise DataError(f"{path}, row {row}: {column} is {value}, which is no id")
    return str(int(value)) if isinstance(value, float) else str(value)


def find_column(path: Path, names: Sequence[str], given: str, usual: Sequence[str], what: str, needed: bool = True) -> str | None:
    """The column that was named, or the one with a usual name.

    Raises:
        DataError: the named one is not there, or there is none or more than one with a usual name where one is needed, or it is there twice.
    """
    if given and given not in names:
        raise DataError(f"{path}: {unknown('column', given, names)}")
    found = [given] if given else [name for name in names if name.lower() in usual]
    for name in found:
        if names.count(name) > 1:
            raise DataError(_twice(path, name))
    if len(found) > 1 or (needed and not found):
        state = f"{len(found)} columns that could be the {what} ({', '.join(found)})" if found else f"no {what} column"
        raise DataError(f"{path} has {state}; name it with --{what}-column (columns: {', '.join(names)[:200]})")
    return found[0] if found else None


def _twice(path: Path, column: str) -> str:
    return f"{path} has the column {column!r} twice; give one of them another name in the file"


def number(text: str) -> float:
    """A cell as a number. An underscore is part of none, though Python's own reading takes ``1_0`` for 10.

    Raises:
        ValueError: it is none.
    """
    if "_" in text:
        raise ValueError(f"{text!r} is no number")
    return float(text)


@dataclass(frozen=True)
class InteractionTable:
    """Interactions of one table, every pair of user and item once.

    Attributes:
        users, items: the source's ids.
        times: seconds or whatever unit the table has, shape ``(n,)``; None without a time column.
        parts: 0, 1 or 2 for train, val and test, shape ``(n,)``; None without a split column.
        doubled: rows that repeated a pair and were dropped.
    """

    users: list[str]
    items: list[str]
    times: np.ndarray | None
    parts: np.ndarray | None
    doubled: int


def read_interactions(
    path: Path, *, user_column: str = "", item_column: str = "", time_column: str = "", split_column: str = "", rule: str = ""
) -> InteractionTable:
    """Read a table of interactions.

    A pair that is there several times is kept once, with its earliest time.

    Args:
        path: the file.
        user_column, item_column, time_column, split_column: names; by default those usual in the field. A time column that is not named is
            read for a rule that goes by time, and left alone otherwise.
        rule: the split rule that was asked for, if any; then a column that merely looks like a split is not used.

    Raises:
        DataError: a column is missing (one of times too, where the rule needs them) or holds something else, or one pair is in two parts.
    """
    names = header(path)
    user = find_column(path, names, user_column, USER_NAMES, "user")
    item = find_column(path, names, item_column, ITEM_NAMES, "item")
    time = find_column(path, names, time_column, TIME_NAMES, "time", needed=False) if time_column or rule in TIMED else None
    if time is None and rule in TIMED:
        raise DataError(
            f"{path} has no time column, which the split rule {rule} needs; name it with --time-column (columns: {', '.join(names)[:200]}), "
            "or choose --split random"
        )
    part = None if rule and not split_column else find_column(path, names, split_column, SPLIT_NAMES, "split", needed=False)
    assert user is not None
    assert item is not None
    if user == item:
        raise DataError(f"{path}: {user!r} cannot be both the user and the item column")
    typed_time = time if path.suffix == ".parquet" else None  # has a type of its own there, and is no text
    table = read_text_table(path, [name for name in (user, item, None if typed_time else time, part) if name])
    users, items = table.columns[user], table.columns[item]
    for column, entries in ((user, users), (item, items)):
        if "" in entries:
            raise DataError(f"{path}, line {table.lines[entries.index('')]}: {column} is empty")
    if typed_time:
        times: np.ndarray | None = _parquet_times(path, typed_time, len(users))
    else:
        times = _times(path, time, table.columns[time], table.lines) if time else None
    parts = _parts(table, part) if part else None
    chosen: dict[tuple[str, str], int] = {}
    for k, pair in enumerate(zip(users, items, strict=True)):
        first = chosen.setdefault(pair, k)
        if first == k:
            continue
        if parts is not None and parts[first] != parts[k]:
            raise DataError(
                f"{path}, line {table.lines[k]}: user {pair[0][:40]!r} has item {pair[1][:40]!r} in two parts (see line {table.lines[first]})"
            )
        if times is not None and times[k] < times[first]:
            chosen[pair] = k
    rows = list(chosen.values())
    return InteractionTable(
        [users[k] for k in rows],
        [items[k] for k in rows],
        times[rows] if times is not None else None,
        parts[rows] if parts is not None else None,
        len(users) - len(rows),
    )


def _parquet_times(path: Path, column: str, rows: int) -> np.ndarray:
    """A column of numbers, of moments (then seconds since 1970) or of texts."""
    import pyarrow
    import pyarrow.compute as compute

    kinds = pyarrow.types
    with parquet_faults(path):
        values = open_parquet(path).read(columns=[column])[column]
        if len(values) != rows:
            raise DataError(f"{path} is no readable parquet file: {column} has {len(values):,} entries, the ids have {rows:,}")
        if kinds.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if values.null_count:
            raise DataError(f"{path}, row {compute.index(values.is_null(), True).as_py() + 1}: {column} is empty; every interaction needs a time")
        if kinds.is_string(values.type) or kinds.is_large_string(values.type):
            return _times(path, column, values.to_pylist(), range(1, len(values) + 1))
        if kinds.is_date(values.type):
            values = values.cast(pyarrow.timestamp("ms"))
        if kinds.is_timestamp(values.type):
            moments = values.cast(pyarrow.int64()).to_numpy() / {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]
        elif kinds.is_integer(values.type) or kinds.is_floating(values.type) or kinds.is_decimal(values.type):
            moments = values.cast(pyarrow.float64(), safe=False).to_numpy()
        else:
            raise DataError(f"{path}: the column {column!r} holds {values.type}; numbers, moments or ISO dates are needed")
    bad = np.flatnonzero(~np.isfinite(moments))
    if len(bad):
        raise DataError(f"{path}, row {bad[0] + 1}: {column} is {moments[bad[0]]}; every interaction needs a time")
    return moments


def _times(path: Path, column: str, texts: Sequence[str], lines: Sequence[int]) -> np.ndarray:
    values = np.empty(len(texts))
    for k, text in enumerate(texts):
        value = math.nan
        with suppress(ValueError):
            value = number(text)
        if math.isnan(value):
            with suppress(ValueError, OverflowError):
                moment = datetime.fromisoformat(text)
                value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if not math.isfinite(value):
            raise DataError(f"{path}, line {lines[k]}: {column} is {text[:40]!r}; a number or an ISO date such as 2014-07-23 is needed")
        values[k] = value
    return values


def _parts(table: TextTable, column: str) -> np.ndarray:
    parts = np.empty(len(table.lines), dtype=np.int64)
    for k, text in enumerate(table.columns[column]):
        part = _PARTS.get(text.lower())
        if part is None:
            raise DataError(f"{table.path}, line {table.lines[k]}: {column} is {text[:40]!r}; train, val or test is needed (or 0, 1, 2)")
        parts[k] = part
    return parts
