"""Tables of which Adam moves the rows that a step reads, and the others when they are next read."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ckd_fed.kernels import Kernels, check_rows, kernels
from ckd_fed.training.drift import BETAS, EPS, Drift
from ckd_fed.training.fused import fused_adam

Rows = tuple[Tensor, Tensor, Tensor]  # a parameter's and its two moments'


def behind_of(learning_rate: float, step: int, tables: Rows) -> Behind:
    """A table, on the CPU, of which rows may be behind from now on; of float32 by the compiled kernels where there are some.

    Args:
        learning_rate: of every step.
        step: the last one.
        tables: the parameter and its moments, ``(n, d)``, all as that step left them.
    """
    compiled, fit = kernels(), all(table.dtype == torch.float32 and table.is_contiguous() for table in tables)
    return InPlace(learning_rate, step, tables, compiled) if compiled is not None and fit else Gathered(learning_rate, step, tables)


class Behind(ABC):
    """A table of which rows may be behind; see :func:`behind_of`."""

    def __init__(self, learning_rate: float, step: int, tables: Rows) -> None:
        self._learning_rate = learning_rate
        self._drift = Drift(learning_rate, step)
        self._tables = tables
        self._last = torch.full((len(tables[0]),), step, dtype=torch.int64)  # the step after which each row is as it stands
        self._named: Tensor | None = None  # rows that were caught up, of which a step is to follow

    @abstractmethod
    def catch_up(self, rows: Tensor) -> None:
        """Move on the rows, ascending and each once; a step is to follow."""

    def caught_up(self, rows: Tensor) -> bool:
        """Whether these are the rows that were caught up for this step."""
        return self._named is not None and torch.equal(self._named, rows)

    def take(self, rows: Tensor, gradient: Tensor, step: Tensor) -> bool:
        """A step of the rows, ascending and each once.

        Args:
            rows: ``(k,)``.
            gradient: ``(k, d)``.
            step: number of the parameter's steps, which is counted.

        Returns:
            Whether it was taken: not where some are behind.
        """
        if not self.caught_up(rows):
            self._close()
            if bool((self._last[rows] != self._drift.step).any()):
                return False
        self._move(rows, gradient, step)
        self._drift.advance()
        self._last[rows] = self._drift.step
        self._named = None
        return True

    @abstractmethod
    def _move(self, rows: Tensor, gradient: Tensor, step: Tensor) -> None:
        """The step, of rows that are not behind."""

    def _close(self) -> None:
        """No step follows of the rows that were caught up."""
        self._named = None

    @abstractmethod
    def settle(self) -> None:
        """Bring the whole table up to date."""


class InPlace(Behind):
    """By the compiled kernels, which change rows where they are."""

    def __init__(self, learning_rate: float, step: int, tables: Rows, compiled: Kernels) -> None:
        super().__init__(learning_rate, step, tables)
        self._compiled = compiled

    def catch_up(self, rows: Tensor) -> None:
        check_rows(rows, len(self._last))
        self._drift.apply_compiled(self._compiled, self._tables, self._last, rows.contiguous())
        self._named = rows

    def _move(self, rows: Tensor, gradient: Tensor, step: Tensor) -> None:
        parameter, exp_avg, exp_avg_sq = self._tables
        number = float(step.add_(1))
        self._compiled.adam(parameter, gradient.contiguous(), (exp_avg, exp_avg_sq), number, self._learning_rate, BETAS, EPS, rows.contiguous())

    def settle(self) -> None:
        self._drift.apply_compiled(self._compiled, self._tables, self._last)


class Gathered(Behind):
    """By torch's operations, on copies of the rows; what is open between catching up and the step is the copies."""

    _open: Rows | None = None  # rows that were caught up, of which only the parameter is written yet

    def _gather(self, rows: Tensor) -> Rows:
        parameter, exp_avg, exp_avg_sq = (table.index_select(0, rows) for table in self._tables)
        return parameter, exp_avg, exp_avg_sq

    @staticmethod
    def _scatter(table: Tensor, rows: Tensor, new: Tensor) -> None:
        table.numpy()[rows.numpy()] = new.numpy()  # a third of the time of torch's index_copy_, in tables far larger than the cache

    def _close(self) -> None:
        if self._named is not None and self._open is not None:
            self._write(self._named, self._open)
            self._last[self._named] = self._drift.step
        self._named = self._open = None

    def _write(self, rows: Tensor, new: Rows) -> None:
        for table, values in zip(self._tables, new, strict=True):
            self._scatter(table, rows, values)

    def catch_up(self, rows: Tensor) -> None:
        self._close()
        new = self._gather(rows)
        self._drift.apply(*new, self._last[rows])
        self._scatter(self._tables[0], rows, new[0])
        self._named, self._open = rows, new

    def _move(self, rows: Tensor, gradient: Tensor, step: Tensor) -> None:
        new = self._open or self._gather(rows)  # open are those of these very rows, or none
        fused_adam([(new[0], gradient, new[1], new[2], step)], self._learning_rate)
        self._write(rows, new)
        self._open = None

    def settle(self) -> None:
        self._close()
        self._drift.apply(*self._tables, self._last)
