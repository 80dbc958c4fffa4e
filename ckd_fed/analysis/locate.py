"""Find a run by its name or its folder."""

from __future__ import annotations

import os
from pathlib import Path

from ckd_fed.errors import DataError, unknown

RECORD = "metrics.jsonl"


def runs_directory() -> Path:
    """Where runs are looked for by name: ``runs/`` in $CKD_FED_HOME, else in ~/.ckd_fed."""
    return Path(os.environ.get("CKD_FED_HOME", "") or Path.home() / ".ckd_fed").expanduser() / "runs"


def list_runs(root: Path) -> list[Path]:
    """Folders below ``root`` that hold a run, the most recently written last."""
    return sorted((path.parent for path in root.glob(f"*/{RECORD}")), key=lambda path: (path / RECORD).stat().st_mtime)


def find_run(name: str) -> Path:
    """The folder of a run.

    Args:
        name: of a run in :func:`runs_directory`, or a run's folder anywhere.

    Raises:
        DataError: there is none; the message lists the latest runs.
    """
    for path in (runs_directory() / name, Path(name).expanduser()):
        if (path / RECORD).is_file():
            return path.resolve()
    latest = [path.name for path in list_runs(runs_directory())[-8:]]
    known = latest or [f"none in {runs_directory()}; name a run's folder, or set CKD_FED_HOME"]
    raise DataError(unknown("run", name, known))
