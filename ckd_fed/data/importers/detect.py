"""Which layout a folder or a list of files is in, and reading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ckd_fed.data.dataset import SPLITS
from ckd_fed.data.draft import Draft
from ckd_fed.data.importers.hkuds import find_matrix, read_hkuds
from ckd_fed.data.importers.lattice import core_folders, read_lattice
from ckd_fed.data.importers.mmrec import read_mmrec
from ckd_fed.data.importers.own import Options, read_own, sort_files
from ckd_fed.data.importers.vectors import ENDINGS
from ckd_fed.errors import DataError

LAYOUTS: dict[str, Callable[[Path], Draft]] = {"lattice": read_lattice, "mmrec": read_mmrec, "hkuds": read_hkuds}
OWN = "own"


def layouts_of(directory: Path) -> list[str]:
    """The published layouts whose files are in a folder."""
    marks = {
        "lattice": bool(core_folders(directory)),
        "mmrec": any(directory.glob("*.inter")),
        "hkuds": find_matrix(directory, "train") is not None,
    }
    return [name for name, there in marks.items() if there]


def read_draft(paths: Sequence[Path], *, layout: str = "", features: Mapping[str, Path] | None = None, options: Options | None = None) -> Draft:
    """Read what a user names.

    Args:
        paths: one folder, or files.
        layout: lattice, mmrec, hkuds or own; by default whichever the folder shows, and own for files.
        features: modality -> file, for files whose name does not say their modality.
        options: for one's own tables.

    Raises:
        DataError: the paths are not there, or are no dataset, or two files are for one modality.
    """
    for path in [*paths, *(features or {}).values()]:
        if not path.exists():
            raise DataError(f"{path} does not exist")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise DataError(f"{folders[0]} is a folder; name either one folder or files")
    options = options or Options()
    files = list(paths)
    if folders:
        found = layouts_of(folders[0])
        if not layout and len(found) > 1:
            _refuse_options(found[0], features, options)
            return _read_several(folders[0], found)
        layout = layout or (found[0] if found else OWN)
        if layout != OWN:
            _refuse_options(layout, features, options)
            return LAYOUTS[layout](folders[0])
        files = [path for path in sorted(folders[0].iterdir()) if path.suffix in ENDINGS and not path.name.startswith(".")]
    elif layout not in ("", OWN):
        raise DataError(f"the layout {layout} is a folder; {paths[0]} is a file")
    features = features or {}
    interactions, rest = sort_files(files, options, list(features.values()))
    for modality in features:
        if modality in rest:
            raise DataError(
                f"{rest[modality]} and {features[modality]} (--features) are both for the modality {modality!r}; leave one of them out, or give "
                "the first another modality with --features MODALITY=FILE"
            )
    return read_own(interactions, {**rest, **features}, options)


def _read_several(directory: Path, layouts: Sequence[str]) -> Draft:
    """Read a folder that is in several layouts, as the published sets often are; that they hold the same interactions is checked."""
    said = f"{directory} is in several layouts ({', '.join(layouts)})"
    drafts = []
    for layout in layouts:
        try:
            drafts.append(LAYOUTS[layout](directory))
        except DataError as error:
            raise DataError(f"{said}, and as {layout} it cannot be read: {error}; choose one with --layout") from None
    first, *others = drafts
    for other in others:
        for split in SPLITS:
            if not np.array_equal(_sorted(first.parts[split]), _sorted(other.parts[split])):
                raise DataError(f"{said}, and the {split} interactions of {first.layout} and {other.layout} differ; choose one with --layout")
    first.notes.append(f"the folder is in several layouts ({', '.join(layouts)}) of the same interactions; it was read as {first.layout}")
    return first


def _sorted(pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    users, items = pairs
    order = np.lexsort((items, users))
    return np.stack([users[order], items[order]])


def _refuse_options(layout: str, features: Mapping[str, Path] | None, options: Options) -> None:
    """A published layout has its split and its ids; an option that would do nothing is refused."""
    if features or options != Options():
        raise DataError(f"the layout {layout} brings its own split, columns and features; the options for own tables do not apply to it")
