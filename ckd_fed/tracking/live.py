"""Live progress on a terminal: a bar for every learner under the lines of the log. In a pipe or a file there are the lines alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ckd_fed.evaluation.metrics import METRIC


class LiveProgress:
    """Bars that follow a run's rows; also a mirror of the record (:class:`~ckd_fed.tracking.record.Mirror`).

    The time left is counted to the last epoch allowed. Early stopping usually comes before it, hence "at most".

    Args:
        console: a terminal.
        epochs: the last epoch allowed; 0 where it is not known yet.
    """

    def __init__(self, console: Console, epochs: int = 0) -> None:
        self.epochs = epochs
        self._bars: dict[str, TaskID] = {}
        self._best: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}  {task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def write(self, line: str) -> None:
        """Print a line above the bars, as it is."""
        self._progress.console.print(Text.from_ansi(line), highlight=False, soft_wrap=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Move the bars to where a row of ``metrics.jsonl`` says that the learners are."""
        if row.get("event") != "round":
            return
        if row.get("phase") == "distillation":
            self._hide_others("student")
            self._move("student", row, "")
        else:
            for key in row:
                if key.endswith("/epoch"):
                    learner = key.removesuffix("/epoch")
                    self._move(learner, row, f"{learner}/")
        self._progress.refresh()  # a short training ends between two of rich's own refreshes

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the bars away."""
        self._progress.stop()

    def _move(self, learner: str, row: Mapping[str, Any], prefix: str) -> None:
        epoch, recall = row.get(f"{prefix}epoch"), row.get(f"{prefix}val/{METRIC}")
        if epoch is None:
            return
        if recall is not None:
            self._best[learner] = max(self._best.get(learner, 0.0), recall)
        said = "" if recall is None else f"val R@20 {recall:.4f} (best {self._best[learner]:.4f})"
        total = max(self.epochs, epoch)
        if learner not in self._bars:
            # started at its first row: from then on rich knows how fast it goes
            self._bars[learner] = self._progress.add_task(learner.replace("teacher/", "teacher "), total=total, said=said, left="at most")
        done = bool(row.get(f"{prefix}done"))
        left = "converged" if done else "at most"
        self._progress.update(self._bars[learner], completed=epoch, total=epoch if done else total, said=said, left=left)

    def _hide_others(self, learner: str) -> None:
        for name, bar in self._bars.items():
            if name != learner:
                self._progress.update(bar, visible=False)


class FollowedLog:
    """Follows a run of other processes by the lines that they print: once they name the run's directory, its rows move the bars.

    Args:
        live: the bars.
    """

    _MARK = "run directory: "

    def __init__(self, live: LiveProgress) -> None:
        self.live = live
        self._file: Path | None = None
        self._read = 0

    def line(self, line: str) -> None:
        """Show a line, and look for new rows."""
        self.live.write(line.rstrip("\n"))
        if self._MARK in line:
            directory = Path(line.split(self._MARK, 1)[1].strip())
            self._file, self._read = directory / "metrics.jsonl", 0
            self.live.epochs = _last_epoch(directory / "config.yaml")
        self.rows()

    def rows(self) -> None:
        """Hand new rows on; the directory may be on another machine, and its last line half written."""
        if self._file is None or not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self.live.log(json.loads(line))


def _last_epoch(path: Path) -> int:
    import yaml

    try:
        return int(yaml.safe_load(path.read_text())["training"]["epochs"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0
