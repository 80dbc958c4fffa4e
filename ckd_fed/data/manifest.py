"""The manifest beside a dataset: where it comes from, how it was made, and the checksum of every file in it.

``manifest.json`` is written with the dataset and held against its files whenever they are loaded, so that a file that was changed since is
one clear line rather than a strange result. A dataset without a manifest is fine; then nothing is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckd_fed.errors import DataError

NAME = "manifest.json"
VERSION = 1
_BLOCK = 1 << 20


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def source_record(path: Path) -> dict[str, Any]:
    """A source file: its name (never its folder, which is this machine's affair), size and sha256."""
    return {"name": path.name, **file_record(path)}


def write_manifest(directory: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a finished dataset folder.

    Args:
        directory: the folder; every file in it is recorded.
        about: what the writer knows: sources, split, modalities, notes.
    """
    files = {path.name: file_record(path) for path in sorted(directory.iterdir()) if path.name != NAME}
    text = json.dumps({"manifest": VERSION, **about, "files": files}, indent=1, ensure_ascii=False)
    (directory / NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a dataset folder, or None where there is none.

    Raises:
        DataError: it is damaged, or of a later version.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}; restore it, or delete it to go without the checks") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(r, dict) and {"bytes", "sha256"} <= set(r) for r in files.values()):
        raise DataError(f"{path} is damaged: it lists no files with their bytes and sha256; restore it, or delete it to go without the checks")
    if manifest.get("manifest") != VERSION:
        raise DataError(f"{path} is of version {manifest.get('manifest')!r}, this ckd_fed reads version {VERSION}; import the dataset again")
    return manifest


def verify(directory: Path, modalities: Iterable[str] | None) -> None:
    """Hold the split files, the lists of ids and some modalities' files against the manifest, if there is one.

    A modality that the manifest does not know was added later and is not checked; only the files of modalities asked for are read, those of
    all that the manifest knows if none are named.

    Raises:
        DataError: a file is missing, was changed, or a mask or a list of ids appeared that the manifest does not know.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return
    files: dict[str, dict[str, Any]] = manifest["files"]
    wanted = [f"{name}.json" for name in ("train", "val", "test", "users", "items")]
    known = [name[: -len("_feat.npy")] for name in files if name.endswith("_feat.npy")]
    for modality in known if modalities is None else modalities:
        if f"{modality}_feat.npy" in files:
            wanted += [f"{modality}_feat.npy", f"{modality}_mask.npy"]
    for name in wanted:
        path, record = directory / name, files.get(name)
        remedy = f"restore it, import the dataset again, or delete {directory / NAME} if the change is meant"
        if record is None:
            if path.exists():
                raise DataError(f"{path} is not in the dataset's manifest, so it was added later: remove it, or {remedy.partition(', ')[2]}")
            continue
        if not path.is_file():
            raise DataError(f"{path} is in the dataset's manifest but not there: {remedy}")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise DataError(f"{path} was changed after the dataset was made ({size:,} bytes, the manifest says {record['bytes']:,}): {remedy}")
        digest = file_record(path)["sha256"]
        if digest != record["sha256"]:
            raise DataError(
                f"{path} was changed after the dataset was made (sha256 {digest[:12]}…, the manifest says {str(record['sha256'])[:12]}…): {remedy}"
            )
