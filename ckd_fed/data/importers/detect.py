"""Which layout a folder or a list of files is in, and reading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
        DataError: the paths are not there, or are no dataset.
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
            raise DataError(f"{folders[0]} looks like several layouts ({', '.join(found)}); choose one with --layout")
        layout = layout or (found[0] if found else OWN)
        if layout != OWN:
            _refuse_options(layout, features, options)
            return LAYOUTS[layout](folders[0])
        files = [path for path in sorted(folders[0].iterdir()) if path.suffix in ENDINGS and not path.name.startswith(".")]
    elif layout not in ("", OWN):
        raise DataError(f"the layout {layout} is a folder; {paths[0]} is a file")
    interactions, rest = sort_files(files, options, list((features or {}).values()))
    return read_own(interactions, {**rest, **(features or {})}, options)


def _refuse_options(layout: str, features: Mapping[str, Path] | None, options: Options) -> None:
    """A published layout has its split and its ids; an option that would do nothing is refused."""
    if features or options != Options():
        raise DataError(f"the layout {layout} brings its own split, columns and features; the options for own tables do not apply to it")
