"""The record of a run: ``metrics.jsonl``, flushed and fsynced row by row, mirrored to Weights & Biases and the console."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckd_fed.checkpoint import save_checkpoint
from ckd_fed.config import Config
from ckd_fed.errors import ConfigError, DataError
from ckd_fed.files import held, write_atomically
from ckd_fed.tracking import console
from ckd_fed.tracking.result import RunResult

if TYPE_CHECKING:
    from ckd_fed.analysis.users import UserTable

Values = Mapping[str, float]
LOCK = ".lock"  # in a run's folder: whoever holds it writes there


class Mirror(Protocol):
    """Receives every row after it is safe in ``metrics.jsonl``; must not raise."""

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Record:
    """Writes a run's directory.

    ::

        <home>/runs/<run>/config.yaml       as resolved
                          metrics.jsonl     one JSON object a line, each flushed to disk before the run goes on
                          checkpoints/      best.safetensors, last.safetensors: the student's parameters
                          test_users.npz    test metrics of every user (unless evaluation.user-table=false)
                          wandb/            what W&B writes

    Rows carry ``event`` (``start``, ``validation``, ``round``, ``groups``, ``final`` or ``failed``), ``time``, and ``round``, a counter over
    both phases.

    Args:
        directory: of the run; must not hold a run already.
        config: the resolved configuration.
        mirrors: made when the directory exists, with it as argument.
        write: prints one line.
        resume_at: go on with the run that the directory holds, from this length of its ``metrics.jsonl`` on; see :func:`rewind`.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        mirrors: Sequence[Callable[[Path], Mirror]] = (),
        write: Callable[[str], None] = console.write,
        *,
        resume_at: int | None = None,
    ) -> None:
        self.directory = directory
        self.write = write
        if resume_at is None and (directory / "metrics.jsonl").exists():
            raise ConfigError(f"{directory} holds a run already; choose another name, or leave name empty for one made from the time")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if resume_at is None:
                write_atomically(directory / "config.yaml", config.to_yaml().encode())
            else:
                rewind(directory / "metrics.jsonl", resume_at)
            self._file = (directory / "metrics.jsonl").open("ab")
        except OSError as error:
            raise DataError(f"the run's directory {directory} cannot be written: {error}") from None
        self._mirrors = [make(directory) for make in mirrors]

    def row(self, event: str, **values: Any) -> None:
        """Append a row to ``metrics.jsonl`` and hand it to the mirrors. NaN and infinities are written as null."""
        row = {"event": event, "time": round(time.time(), 3), **values}
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for mirror in self._mirrors:
            mirror.log(clean)

    def position(self) -> int:
        """Bytes of ``metrics.jsonl`` so far, all of them on disk."""
        return (self.directory / "metrics.jsonl").stat().st_size

    def start(self, description: str, **values: Any) -> None:
        """Say what runs where."""
        self.row("start", description=description, **values)
        self.write(description)
        self.write(f"run directory: {self.directory}")

    def pretraining_round(self, number: int, reports: Mapping[str, Sequence[Values]], seconds: float, n_bytes: int = 0) -> None:
        """A round of phase 1.

        Args:
            number: of the round.
            reports: ``teacher/<m>`` or ``plain`` -> rows of :meth:`~ckd_fed.training.fit.Fit.advance`.
            seconds: wall time of the round.
            n_bytes: sent and received.
        """
        merged: dict[str, float] = {}
        for name, rows in reports.items():
            for row in rows:
                self.row("validation", phase="teachers", round=number, **{f"{name}/{key}": value for key, value in row.items()})
            if rows:
                merged.update({f"{name}/{key}": value for key, value in rows[-1].items()})
        self.row("round", phase="teachers", round=number, **{**merged, "seconds": seconds, "bytes": n_bytes})
        self.write(console.pretraining_line(number, reports, seconds, n_bytes))

    def distillation_round(self, number: int, values: Values, modalities: Sequence[str]) -> None:
        """A round of phase 2; ``values`` holds ``epoch``, losses, ``val/…``, per-modality numbers, ``seconds`` and ``bytes``."""
        self.row("round", phase="distillation", round=number, **values)
        self.write(console.distillation_line(number, values, modalities))

    def checkpoint(self, name: str, parameters: Mapping[str, np.ndarray], **state: Any) -> None:
        """Keep a student's parameters as ``checkpoints/<name>.safetensors``, replacing what was there."""
        save_checkpoint(self.directory / "checkpoints" / f"{name}.safetensors", parameters, state)

    def users(self, table: UserTable) -> None:
        """Keep the test metrics of every user, ``test_users.npz``; the run does not depend on the file."""
        try:
            table.save(self.directory / "test_users.npz")
        except OSError as error:
            self.write(f"test_users.npz could not be written ({error}); `ckd-fed compare` will lack this run")

    def groups(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the row of recall by groups of users and items, all models in one."""
        self.row("groups", groups=list(rows))

    def finish(self, result: RunResult, seconds: float) -> None:
        """Write the final row and print the final table."""
        self.row("final", seconds=seconds, **result.summary())
        for mirror in self._mirrors:
            mirror.finish(result.summary())
        self.write(console.final_table(result))
        self.close()

    def fail(self, reason: str) -> None:
        """Record why the run ended early, if the disk still takes it: it must not come between that and whoever is to know."""
        with suppress(OSError):
            self.row("failed", reason=reason)
        for mirror in self._mirrors:
            mirror.finish({"failed": reason})
        self.close()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows


def rewind(path: Path, length: int) -> None:
    """Take back the rows after a length: those of a round that was not finished, which will be written again. Why a run failed is kept.

    Raises:
        DataError: the file is missing or shorter.
    """
    content = path.read_bytes() if path.is_file() else b""
    if len(content) < length:
        raise DataError(f"{path} has {len(content)} bytes, its run's checkpoint accounts for {length}; it was changed, the run cannot be resumed")
    kept = [line for line in content[length:].splitlines(keepends=True) if line.endswith(b"\n") and json.loads(line)["event"] == "failed"]
    write_atomically(path, content[:length] + b"".join(kept))


def run_name(config: Config, suffix: str = "") -> str:
    """The configured name, or dataset-backbone-time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    backbone = config.backbone.replace(":", "-")  # module:Class
    return config.name or "-".join(part for part in (config.dataset, backbone, stamp, suffix) if part)


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold a run's directory for this process; the operating system lets go of it however the process ends.

    Raises:
        ConfigError: another process is writing this run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / LOCK
    lock.touch()
    with held(lock, ConfigError(f"another process is writing {directory}; wait for it, or end it, before this run is started or resumed")):
        yield
