"""Find a run by its name or its folder."""

from __future__ import annotations

from pathlib import Path

from ckd_fed.config import Config
from ckd_fed.errors import DataError, unknown
from ckd_fed.files import expanded
from ckd_fed.home import home

RECORD = "metrics.jsonl"


def runs_directory() -> Path:
    """Where runs are looked for by name: ``runs/`` in $CKD_FED_HOME, else in ~/.ckd_fed.

    Raises:
        ConfigError: that is no absolute path, or no folder.
    """
    return home(Config()) / "runs"


def list_runs(root: Path) -> list[Path]:
    """Folders below ``root`` that hold a run, the most recently written last."""
    records = [path for path in root.glob(f"*/{RECORD}") if path.is_file()]
    return [path.parent for path in sorted(records, key=lambda path: path.stat().st_mtime)]


def find_run(name: str) -> Path:
    """The folder of a run.

    Args:
        name: of a run in :func:`runs_directory`, or a run's folder anywhere.

    Raises:
        DataError: there is none; the message lists the latest runs.
        ConfigError: the name is empty, or begins with a user that there is none of.
    """
    named = runs_directory() / name
    path = named if name and (named / RECORD).is_file() else expanded(name, "RUN")  # a run may be called ~x
    if (path / RECORD).is_file():
        return path.resolve()
    latest = [path.name for path in list_runs(runs_directory())[-8:]]
    known = latest or [f"none in {runs_directory()}; name a run's folder, or set CKD_FED_HOME"]
    raise DataError(unknown("run", name, known))
