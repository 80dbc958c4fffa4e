"""Rebuild a W&B run from a run's directory: ``metrics.jsonl`` is the record, W&B its mirror."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ckd_fed.analysis.history import RunHistory, read_history
from ckd_fed.config import restore
from ckd_fed.errors import CkdError
from ckd_fed.tracking.wandb_mirror import WandbMirror


def replay(directory: Path, overrides: dict[str, object], write: Callable[[str], None]) -> None:
    """Send a run to W&B anew, as a run of the same name, configuration, rows, tables and artifacts.

    Args:
        directory: of the run.
        overrides: of its configuration: ``tracking.wandb``, which may have been off, and others, for example
            ``{"tracking.wandb": "online", "tracking.project": "mine"}``.
        write: prints one line.

    Raises:
        CkdError: W&B took less than everything (in training this would be no error, here it is what was asked for).
        DataError: the run cannot be read.
    """
    history = read_history(directory)
    config = restore(history.config, overrides)
    facts = {key: value for key, value in history.start.items() if key not in ("event", "time", "description")}
    mirror = WandbMirror(directory, config, {**facts, "replayed": True}, write)
    for row in mirrored_rows(history):
        mirror.log(row)
    summary = {key: value for key, value in history.final.items() if key.startswith("final/")} if history.final else {}
    mirror.finish({"failed": history.failure} if history.failure else summary)
    if mirror.given_up:
        raise CkdError(f"the run {history.name} was not replayed in full: {mirror.given_up}")


def mirrored_rows(history: RunHistory) -> list[dict[str, object]]:
    """Rows in order, every round once: of a round that was done again after a fault, the later one."""

    def place(row: Mapping[str, object]) -> tuple[object, ...]:
        return row["event"], row.get("phase"), row.get("round")

    last = {place(row): index for index, row in enumerate(history.rows)}
    return [dict(row) for index, row in enumerate(history.rows) if row["event"] != "round" or last[place(row)] == index]
