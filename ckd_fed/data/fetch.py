"""Download a publisher's files: resumed after a cut, retried, checked, and in place only when whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ckd_fed.config import configs_directory
from ckd_fed.errors import DataError, unknown
from ckd_fed.files import held

ATTEMPTS = 6  # in a row without a byte
_BLOCK = 1 << 18
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)")

Progress = Callable[[int, int | None], None]  # is told bytes so far and in all, where that is known


@dataclass(frozen=True)
class Source:
    """One file of a publisher.

    Attributes:
        name: of the file on disk.
        url: http or https.
        sha256: where known, else empty.
    """

    name: str
    url: str
    sha256: str = ""


class _Interrupted(Exception):
    """A failure that another attempt may mend."""


def read_sources(name: str, directory: Path | None = None) -> list[Source]:
    """The files of a dataset, from ``configs/sources/<name>.yaml``.

    Raises:
        DataError: an unknown name or a registry file that cannot be used.
    """
    directory = directory or configs_directory() / "sources"
    path = directory / f"{name}.yaml"
    if not path.is_file() or path.parent != directory:
        raise DataError(unknown("source", name, (p.stem for p in directory.glob("*.yaml"))))
    try:
        files = yaml.safe_load(path.read_text(encoding="utf-8"))["files"]
        sources = [Source(str(file), str(entry["url"]), str(entry.get("sha256", ""))) for file, entry in files.items()]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: files with a url each are needed ({type(error).__name__}: {' '.join(str(error).split())[:80]})") from None
    for source in sources:
        if not source.url.startswith(("http://", "https://")) or "/" in source.name or source.name.startswith("."):
            raise DataError(f"{path}: {source.name!r} with the url {source.url!r} is no plain file name with an http address")
        if source.sha256 and not _SHA256.fullmatch(source.sha256):
            raise DataError(f"{path}: the sha256 of {source.name} is {source.sha256[:70]!r}; 64 hexadecimal digits are needed")
    return sources


def fetch(source: Source, directory: Path, progress: Progress = lambda done, total: None, *, wait: float = 1.0, timeout: float = 60.0) -> str:
    """Download a file unless it is there.

    What has arrived is kept beside it under a hidden name, so that a later call goes on from there, provided that the server can and still
    has the same file.

    Args:
        source: what and from where.
        directory: where to; made if need be.
        progress: told of every block.
        wait: seconds before the second attempt, doubled from one to the next; an attempt that brought something starts over.
        timeout: seconds without a byte after which an attempt has failed.

    Returns:
        The file's sha256.

    Raises:
        DataError: it cannot be had, or is not the file that the registry knows, or another process is fetching into that folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Two that go on with one part would each append to it.
    with held(directory, DataError(f"another process is fetching into {directory}; wait for it, or end it")):
        return _fetch(source, directory, progress, wait, timeout)


def _fetch(source: Source, directory: Path, progress: Progress, wait: float, timeout: float) -> str:
    destination = directory / source.name
    if destination.is_file():
        digest = _sha256(destination)
        if source.sha256 and digest != source.sha256:
            raise DataError(
                f"{destination} is not the file that is published (sha256 {digest[:12]}…, published {source.sha256[:12]}…); "
                "remove it to fetch it again"
            )
        return digest
    part, tag = directory / f".{source.name}.part", directory / f".{source.name}.part.json"
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _attempt(source.url, part, tag, progress, timeout)
            break
        except _Interrupted as error:
            after = part.stat().st_size if part.is_file() else 0
            failures = 1 if after > before else failures + 1
            if failures >= ATTEMPTS:
                raise DataError(f"{source.url}: {error} ({ATTEMPTS} times in a row); what has arrived is kept, run the command again later") from None
            time.sleep(wait * 2 ** (failures - 1))
    digest = _sha256(part)
    if source.sha256 and digest != source.sha256:
        part.unlink()
        tag.unlink(missing_ok=True)
        raise DataError(
            f"{source.url} gave a file with sha256 {digest[:12]}…, published is {source.sha256[:12]}…; it was discarded: "
            "fetch it again, or tell the registry if the publisher has changed it"
        )
    os.replace(part, destination)
    tag.unlink(missing_ok=True)
    return digest


def _attempt(url: str, part: Path, tag: Path, progress: Progress, timeout: float) -> None:
    """One request: go on where the part ends if the server can, else from the start."""
    try:
        import requests
        from urllib3.exceptions import HTTPError
    except ModuleNotFoundError:
        raise DataError("downloads need requests; install it with pip install 'ckd_fed[data]'") from None

    have = part.stat().st_size if part.is_file() else 0
    version = _version(tag)
    headers = {"Accept-Encoding": "identity"}  # a .gz is to arrive as it is
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == 416:  # the part is as long as the file, or longer: no telling whether it is the file
                part.unlink()
                raise _Interrupted("the server could not go on where the download was cut")
            if response.status_code in _PASSING:
                raise _Interrupted(f"the server answers {response.status_code} {response.reason}")
            if response.status_code not in (200, 206):
                raise DataError(f"{url}: the server answers {response.status_code} {response.reason}; is the address still right?")
            start, total = _extent(response)
            if start not in (0, have):
                raise _Interrupted(f"the server went on at byte {start:,}, not {have:,}")
            etag = response.headers.get("ETag", "")  # a weak one does not promise the same bytes
            said = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
            if not start:
                part.unlink(missing_ok=True)  # first: what is there is of another version than the one written down next
                tag.write_text(json.dumps({"version": said}))
            elif said and said != version:  # a server that goes on whatever it was asked; one may also say nothing here, then it is as asked
                part.unlink()
                raise _Interrupted("the file was replaced by another while it was fetched")
            with part.open("ab" if start else "wb") as file:
                done = start
                for block in response.raw.stream(_BLOCK, decode_content=False):
                    file.write(block)
                    done += len(block)
                    progress(done, total)
            if not done:
                raise _Interrupted("the server sends an empty file")
            if total is not None and done != total:
                raise _Interrupted(f"the connection was cut at {done:,} of {total:,} bytes")
    except (requests.RequestException, HTTPError) as error:
        raise _Interrupted(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None


def _extent(response: Any) -> tuple[int, int | None]:
    """The byte the response starts at and the length of the whole file, where told."""
    if response.status_code == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise _Interrupted("the server does not say which part of the file it sends")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _version(tag: Path) -> str:
    """What the server called the version of the file that the part is of: only with that is it asked to go on."""
    try:
        return str(json.loads(tag.read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
