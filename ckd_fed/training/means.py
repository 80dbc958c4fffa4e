"""Means over the steps of one epoch or of several, each number counted by the samples that it is of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ckd_fed.distillation.effects import LOWEST

Values = dict[str, float]


class Numbers(NamedTuple):
    """A step's numbers for the log.

    Attributes:
        names: of the numbers.
        values: ``(n,)``.
        weights: what each counts for in means over steps, at most 1, ``(n,)``; None for 1.
    """

    names: list[str]
    values: Tensor
    weights: Tensor | None = None

    def copy(self) -> Numbers:
        """The same in memory of its own."""
        return Numbers(self.names, self.values.clone(), None if self.weights is None else self.weights.clone())


class _Sum(NamedTuple):
    """Of the same numbers of several steps: how many steps, the sums of the numbers times their weights, and of their weights."""

    steps: int
    totals: Tensor
    weights: Tensor | None  # None: each 1 in every step


class Means:
    """Weighted means over steps, kept on the device and read once. All numbers of a step are added up as one vector."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], _Sum] = {}  # by the names of a step's numbers

    def update(self, numbers: Numbers) -> None:
        """Add a step's numbers."""
        values, weights = numbers.values.detach().double(), numbers.weights
        self._add(tuple(numbers.names), _Sum(1, values if weights is None else values * weights, weights))

    def merge(self, other: Means) -> None:
        """Add all steps of others."""
        for names, those in other._sums.items():
            self._add(names, those)

    def _add(self, names: tuple[str, ...], new: _Sum) -> None:
        if names not in self._sums:
            self._sums[names] = new
            return
        steps, totals, weights = self._sums[names]
        if weights is not None or new.weights is not None:
            weights = (steps if weights is None else weights) + (new.steps if new.weights is None else new.weights)  # type: ignore[assignment]
        self._sums[names] = _Sum(steps + new.steps, totals + new.totals, weights)

    def compute(self) -> Values:
        """The means; of an effect the lowest, of anything else 0, where no step had any weight."""
        values: Values = {}
        for names, (steps, totals, weights) in self._sums.items():
            counted = [float(steps)] * len(names) if weights is None else weights.tolist()
            for name, total, weight in zip(names, totals.tolist(), counted, strict=True):
                values[name] = total / weight if weight else LOWEST if name.startswith("effect/") else 0.0
        return values

    def asked(self) -> Values:
        """``asked/<name>``: the mean weight of each number over the steps, by which it counts against that of as many other steps; of those alone
        that have weights."""
        shares: Values = {}
        for names, (steps, _, weights) in self._sums.items():
            if weights is not None:
                shares.update({f"asked/{name}": weight / steps for name, weight in zip(names, weights.tolist(), strict=True)})
        return shares
