"""Amazon's product data of 2014, from the publisher's files: reviews, metadata and image features, each read as a stream.

- ``reviews_<Category>_5.json.gz``: one JSON object a line, with ``reviewerID``, ``asin`` and ``unixReviewTime``; every user and item has at
  least five reviews.
- ``meta_<Category>.json.gz``: one Python literal a line (JSON in later copies), with ``asin``, ``title``, ``brand``, ``categories``, …
- ``image_features_<Category>.b``: for each product ten bytes of ASIN and 4096 float32.

Only what concerns the items of the reviews is kept, so memory is that of the features: 16 KiB an item.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ckd_fed.data.importers.tables import InteractionTable
from ckd_fed.errors import DataError, unknown

CATEGORIES = {
    "baby": "Baby",
    "sports": "Sports_and_Outdoors",
    "clothing": "Clothing_Shoes_and_Jewelry",
    "beauty": "Beauty",
}
CORE = 5
ASIN_BYTES = 10
DIMENSION = 4096
_RECORD = ASIN_BYTES + 4 * DIMENSION
_ASIN = re.compile(rb"[A-Z0-9]{10}")
_META_ASIN = re.compile(rb"""['"]asin['"]\s*:\s*['"]([^'"]*)['"]""")
_LONGEST_LINE = 16 << 20

Progress = Callable[[int], None]  # is told how many bytes of a file have been read so far


@dataclass(frozen=True)
class Files:
    """The three files of a category; the image features may be absent."""

    reviews: Path
    meta: Path
    images: Path | None


def find_files(name: str, directory: Path) -> Files:
    """The files of a dataset in a folder.

    Raises:
        DataError: an unknown name, or a file is not there.
    """
    if name not in CATEGORIES:
        raise DataError(unknown("Amazon dataset", name, CATEGORIES))
    if not directory.is_dir():
        raise DataError(f"{directory} is no folder")
    category = CATEGORIES[name]
    reviews, meta = directory / f"reviews_{category}_5.json.gz", directory / f"meta_{category}.json.gz"
    images = directory / f"image_features_{category}.b"
    for path in (reviews, meta):
        if not path.is_file():
            raise DataError(f"{path} does not exist; it is published as {path.name}, and ckd-fed data fetch {name} downloads it")
    return Files(reviews, meta, images if images.is_file() else None)


def _lines(path: Path, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Lines of a gzip file with their numbers; ``progress`` counts bytes of the compressed file."""
    number = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) as file:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
                    raise DataError(f"{path}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; the file is damaged")
                if number % 1024 == 0:
                    progress(raw.tell())
                if line.strip():
                    yield number, line
            progress(raw.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or truncated after line {number}: {error}; download it again") from None


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line as a dictionary: JSON, or the Python literal of the older files, which is parsed and never evaluated."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number} is not UTF-8 (byte {error.start})") from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise DataError(f"{path}, line {number} is neither JSON nor a Python literal: {ascii(text.strip())[:80]}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number} holds a {type(record).__name__}; an object with named fields is needed")
    return record


def _field(path: Path, number: int, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}, line {number}: {name} is {ascii(value)[:60]}; a text is needed")
    return value


def read_reviews(path: Path, progress: Progress = lambda _: None) -> InteractionTable:
    """Who reviewed what and when; of several reviews of one item by one user the earliest counts.

    Raises:
        DataError: a damaged line, or a user or item with fewer than five interactions.
    """
    times: dict[tuple[str, str], float] = {}
    doubled = 0
    for number, line in _lines(path, progress):
        record = _record(path, number, line)
        pair = (_field(path, number, record, "reviewerID"), _field(path, number, record, "asin"))
        time = record.get("unixReviewTime")
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not abs(time) < 2**53:
            raise DataError(f"{path}, line {number}: unixReviewTime is {ascii(time)[:60]}; seconds are needed")
        doubled += pair in times
        times[pair] = min(times.get(pair, float(time)), float(time))
    if not times:
        raise DataError(f"{path} holds no review")
    for kind, at in (("user", 0), ("item", 1)):
        name, fewest = min(Counter(pair[at] for pair in times).items(), key=lambda entry: (entry[1], entry[0]))
        if fewest < CORE:
            raise DataError(f"{path}: the {kind} {name[:40]!r} has {fewest} interactions; the {CORE}-core file has {CORE} or more of each")
    users, items = zip(*times, strict=True)
    return InteractionTable(list(users), list(items), np.array(list(times.values())), None, doubled)


def read_texts(path: Path, item_ids: list[str], progress: Progress = lambda _: None) -> dict[str, str]:
    """The text of each item: title, brand, categories and description, as far as they are there, joined by blanks.

    Lines of other items are passed over without parsing them.

    Raises:
        DataError: a damaged line, or an item twice with different texts.
    """
    wanted = {name.encode(): name for name in item_ids}
    texts: dict[str, str] = {}
    for number, line in _lines(path, progress):
        found = {match.group(1) for match in _META_ASIN.finditer(line)}
        if found and not any(asin in wanted for asin in found):
            continue
        record = _record(path, number, line)
        asin = _field(path, number, record, "asin")
        if asin.encode() not in wanted:
            continue
        text = item_text(path, number, record)
        if texts.setdefault(asin, text) != text:
            raise DataError(f"{path}, line {number}: {asin} is there twice, with different texts")
    return texts


def item_text(path: Path, number: int, record: dict[str, Any]) -> str:
    """Title, brand, categories and description of one metadata record in one line; empty if there are none."""
    parts: list[str] = []
    for name in ("title", "brand", "categories", "description"):
        _gather(path, number, name, record.get(name), parts)
    return " ".join(" ".join(parts).split())


def _gather(path: Path, number: int, name: str, value: object, parts: list[str]) -> None:
    """Texts in a field, which may be a text or lists of texts."""
    if isinstance(value, str):
        parts.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _gather(path, number, name, one, parts)
    elif value is not None:
        raise DataError(f"{path}, line {number}: {name} is {ascii(value)[:60]}; a text or a list of texts is needed")


def read_images(path: Path, item_ids: list[str], progress: Progress = lambda _: None) -> tuple[np.ndarray, np.ndarray]:
    """Image features of the items, by ASIN.

    Returns:
        Features ``(n_items, 4096)`` float32, zero where there are none, and mask ``(n_items,)`` bool.

    Raises:
        DataError: the file is truncated or out of step, an item is there twice with different features, or a feature is not finite.
    """
    position = {name.encode(): k for k, name in enumerate(item_ids)}
    features = np.zeros((len(item_ids), DIMENSION), dtype=np.float32)
    mask = np.zeros(len(item_ids), dtype=bool)
    size = path.stat().st_size
    if size % _RECORD:
        raise DataError(
            f"{path} has {size:,} bytes, no multiple of the {_RECORD:,} of a record ({ASIN_BYTES} of ASIN, {DIMENSION} float32): "
            "it is truncated or of another dimension; download it again"
        )
    with path.open("rb") as file:
        for number, asin, content in _image_records(path, file):
            if number % 1024 == 0:
                progress(number * _RECORD)
            at = position.get(asin)
            if at is None:
                continue
            row = np.frombuffer(content, dtype="<f4")
            if not np.isfinite(row).all():
                column = int(np.flatnonzero(~np.isfinite(row))[0])
                raise DataError(f"{path}, record {number}: {asin.decode()} has {row[column]} in column {column}")
            if mask[at] and not np.array_equal(features[at], row):
                raise DataError(f"{path}, record {number}: {asin.decode()} is there twice, with different features")
            features[at], mask[at] = row, True
    progress(size)
    return features, mask


def _image_records(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
    number = 0
    while block := file.read(256 * _RECORD):
        for start in range(0, len(block), _RECORD):
            number += 1
            asin = block[start : start + ASIN_BYTES]
            if not _ASIN.fullmatch(asin):
                raise DataError(f"{path}, record {number}: {asin!a} is no ASIN; the file is damaged or of another dimension than {DIMENSION}")
            yield number, asin, block[start + ASIN_BYTES : start + _RECORD]
