"""How far a sweep is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ckd_fed.experiments.recipe import Job


class SweepProgress:
    """Shows the runs of a sweep as they end, and where the one that is running stands.

    On a terminal there is a bar with the time left and beside it how far the running run is; elsewhere a line for every run that ends, and
    between them the running run's last line every so often.

    Args:
        console: decides which of the two.
        total: number of runs.
        every: seconds between two lines about one run in a log.
    """

    def __init__(self, console: Console, total: int, every: float = 300.0) -> None:
        self._total, self._every = total, every
        self._ended = 0
        self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> SweepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, job: Job, how: str) -> None:
        """A run has ended."""
        self._ended += 1
        if self._bar is None:
            self.write(f"{self._ended}/{self._total} {job.run}: {how}")
            return
        self.write(f"{job.run}: {how}")
        self._bar.update(self._task, completed=self._ended, description="")

    def at(self, job: Job, line: str) -> None:
        """The running run says something; only how its rounds go is shown."""
        if not line.startswith("round "):
            return
        if self._bar is not None:
            self._bar.update(self._task, description=escape(f"{job.variant}: {line.split(' loss ')[0]}"))
        elif time.monotonic() - self._said >= self._every:
            self.write(f"{job.run}: {line}")

    def write(self, line: str) -> None:
        """Print a line as it is."""
        self._said = time.monotonic()
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
