"""A dataset on its way in: what a reader has gathered, and writing it so that nobody ever sees half of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed import __version__
from ckd_fed.data.dataset import SPLITS, check_modality, load_dataset
from ckd_fed.data.features import features_fingerprint
from ckd_fed.data.folder import whole_folder
from ckd_fed.data.manifest import source_record, write_manifest
from ckd_fed.errors import DataError

_BLOCK_BYTES = 32 << 20
_RESERVED = ("", ".", "..")


@dataclass
class ModalityDraft:
    """One modality's features as gathered.

    Attributes:
        features: shape ``(n_items, dimension)``; may be memory-mapped.
        mask: which items have the modality, shape ``(n_items,)`` bool; None if all have it.
        source: name of the file they come from.
        encoder: what computed them, where that is known.
        transform: what was done to them since.
    """

    features: np.ndarray
    mask: np.ndarray | None = None
    source: str = ""
    encoder: str = ""
    transform: str = ""


@dataclass
class Draft:
    """A dataset as gathered.

    Attributes:
        layout: the layout it was read from.
        user_ids, item_ids: the source's ids, in the order of the new ids 0, 1, ….
        parts: split -> users and items of its interactions, two int64 arrays of new ids.
        modalities: by name.
        rule: how the interactions were split, for the manifest: ``rule`` and, where something was drawn, ``seed``.
        sources: the files read.
        notes: what was left out or changed on the way, in words.
        earlier_sources: records of files read when the dataset that this one is made from was made.
    """

    layout: str
    user_ids: list[str]
    item_ids: list[str]
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]]
    modalities: dict[str, ModalityDraft]
    rule: dict[str, Any]
    sources: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    earlier_sources: list[dict[str, Any]] = field(default_factory=list)


def check_name(name: str) -> None:
    """A dataset's name is a plain folder name."""
    if name in _RESERVED or name.startswith(".") or any(mark in name for mark in "/\\") or not name.isprintable():
        raise DataError(f"the dataset's name is {name!r}; give a plain name such as 'mine', which becomes a folder's")


def write_draft(draft: Draft, destination: Path, *, dtype: str = "", replace: bool = False) -> dict[str, Any]:
    """Write a draft as ``destination`` in the project's layout, with id maps and a manifest.

    Everything goes into a hidden folder beside it, is loaded from there as a run would load it, and is then renamed into place.

    Args:
        draft: what to write.
        destination: folder to make.
        dtype: of the features on disk, ``float16`` or ``float32``; by default as they come, float64 as float32.
        replace: put it in the place of a dataset that is there.

    Returns:
        What the manifest says, but for the files.

    Raises:
        DataError: the destination exists, a modality's name cannot be used, or the draft is no dataset that could be loaded.
    """
    for modality in draft.modalities:
        check_modality(modality)
    if destination.exists() and not replace:
        raise DataError(f"{destination} exists; choose another name, or say --replace to put this dataset in its place")
    with whole_folder(destination, replace=replace) as fresh:
        return _fill(fresh, draft, dtype)


def _fill(directory: Path, draft: Draft, dtype: str) -> dict[str, Any]:
    for split in SPLITS:
        users, items = draft.parts[split]
        order = np.lexsort((items, users))
        users, items = users[order], items[order]
        starts = np.flatnonzero(np.diff(users, prepend=-1))
        table = {str(users[start]): row.tolist() for start, row in zip(starts, np.split(items, starts[1:]), strict=True)} if len(users) else {}
        (directory / f"{split}.json").write_text(json.dumps(table))
    for name, ids in (("users.json", draft.user_ids), ("items.json", draft.item_ids)):
        (directory / name).write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    for modality, one in draft.modalities.items():
        _write_features(directory / f"{modality}_feat.npy", modality, one, dtype)
        if one.mask is not None and not one.mask.all():
            np.save(directory / f"{modality}_mask.npy", one.mask)
    dataset = load_dataset(directory, at_least=0)
    about: dict[str, Any] = {
        "made_by": f"ckd_fed {__version__}",
        "layout": draft.layout,
        "sources": [*draft.earlier_sources, *(source_record(path) for path in draft.sources)],
        "users": dataset.n_users,
        "items": dataset.n_items,
        "split": {
            **draft.rule,
            **{split: len(getattr(dataset, split)) for split in SPLITS},
            "fingerprint": dataset.fingerprint,
        },
        "modalities": {
            modality: {
                "dimension": features.shape[1],
                "dtype": str(features.dtype),
                "missing": int((~dataset.masks[modality]).sum()) if modality in dataset.masks else 0,
                "source": draft.modalities[modality].source,
                **({"transform": draft.modalities[modality].transform} if draft.modalities[modality].transform else {}),
                **({"encoder": draft.modalities[modality].encoder} if draft.modalities[modality].encoder else {}),
                "fingerprint": features_fingerprint(features),
            }
            for modality, features in dataset.features.items()
        },
        "notes": draft.notes,
    }
    write_manifest(directory, about)
    return about


def _write_features(path: Path, modality: str, one: ModalityDraft, dtype: str) -> None:
    features = one.features
    target = np.dtype(dtype or ("float32" if features.dtype not in (np.float16, np.float32) else features.dtype))
    written = np.lib.format.open_memmap(path, mode="w+", dtype=target, shape=features.shape)
    rows = max(1, _BLOCK_BYTES // max(1, features.shape[1] * 8))
    limit = float(np.finfo(target).max)
    for start in range(0, len(features), rows):
        block = np.asarray(features[start : start + rows])
        over = np.isfinite(block) & (np.abs(block.astype(np.float64, copy=False)) > limit)
        if over.any():
            row, column = (int(at[0]) for at in np.nonzero(over))
            raise DataError(
                f"{one.source or modality}: the {modality} feature {block[row, column]:g} (item {start + row}, column {column}) is beyond {target}"
            )
        written[start : start + rows] = block
    written.flush()
