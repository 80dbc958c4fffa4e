"""Lay out what each node may have: interactions and one modality for a teacher, everything for a student."""

from __future__ import annotations

import shutil
from pathlib import Path

from ckd_fed.data.dataset import SPLITS, load_dataset
from ckd_fed.data.folder import whole_folder
from ckd_fed.data.manifest import NAME, read_manifest, write_manifest
from ckd_fed.data.standin import MARKER
from ckd_fed.errors import DataError

STUDENT = "student"


def teacher_folder(modality: str) -> str:
    """Name of a teacher's silo."""
    return f"teacher-{modality}"


def split_by_modality(source: Path, destination: Path) -> dict[str, list[str]]:
    """Write one folder a node: ``teacher-<modality>`` for each modality, and ``student``.

    A teacher's folder holds the split, its modality's features and mask, and a manifest of just these; neither another modality's features nor
    the lists of the source's user and item ids, which a teacher does not need. All are marked as the stand-in if it is one.

    Args:
        source: a dataset.
        destination: folder to make; all of the silos appear in it at once.

    Returns:
        Folder -> the files in it.

    Raises:
        DataError: the dataset has a fault, or the destination exists.
    """
    dataset = load_dataset(source)
    if destination.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{destination} lies within the dataset {source}; choose a folder elsewhere")
    manifest = read_manifest(source)
    written = {}
    with whole_folder(destination) as fresh:
        for modality in (None, *dataset.modalities):
            folder = fresh / (STUDENT if modality is None else teacher_folder(modality))
            folder.mkdir()
            modalities = dataset.modalities if modality is None else (modality,)
            names = [MARKER, *(f"{split}.json" for split in SPLITS)]
            names += [f"{one}_feat.npy" for one in modalities] + [f"{one}_mask.npy" for one in modalities]
            names += ["users.json", "items.json"] if modality is None else []
            for name in names:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            if manifest is not None:
                about = {key: value for key, value in manifest.items() if key not in ("manifest", "files")}
                kept = {name: one for name, one in manifest.get("modalities", {}).items() if name in modalities}
                if modality is not None:  # the sources and notes speak of other modalities and of ids
                    about = {key: about[key] for key in ("made_by", "layout", "users", "items", "split") if key in about}
                write_manifest(folder, {**about, "modalities": kept})
            silo = load_dataset(folder, at_least=1)
            if silo.fingerprint != dataset.fingerprint or silo.modalities != tuple(modalities):
                raise DataError(f"{source} changed while it was copied; try again")
            written[folder.name] = sorted(path.name for path in folder.iterdir() if path.name != NAME)
    return written
