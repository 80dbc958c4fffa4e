"""Training with validation and early stopping, cut into stretches of any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from ckd_fed.data.triples import StepTriples
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.training.means import Means, Values
from ckd_fed.training.trainer import Trainer

Sheets = Mapping[str, np.ndarray]
OnValidation = Callable[[Values], None]


class Fit:
    """Trains until early stopping or the last epoch, keeping the best parameters.

    A node that trains in stretches makes a new Fit for each, sets the state and calls :meth:`advance`; the result is that of one
    uninterrupted call.

    Args:
        trainer: what is trained.
        max_epochs: last epoch at the latest.
        validate_every: epochs between validations.
        patience: see :class:`~ckd_fed.training.early_stopping.EarlyStopping`.

    Attributes:
        epoch: epochs trained so far.
        stopping: the state of early stopping.
        best: parameters at the best validation; empty before the first.
    """

    def __init__(self, trainer: Trainer, *, max_epochs: int, validate_every: int, patience: int) -> None:
        self.trainer = trainer
        self.max_epochs = max_epochs
        self.validate_every = validate_every
        self.epoch = 0
        self.stopping = EarlyStopping(patience)
        self.best: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        return self.stopping.stop or self.epoch >= self.max_epochs

    def advance(
        self,
        epochs: int | None = None,
        *,
        sheets: Callable[[Sequence[StepTriples]], Sheets] | None = None,
        on_validation: OnValidation | None = None,
    ) -> list[Values]:
        """Train on, by default to the end.

        Args:
            epochs: how many epochs at most.
            sheets: an epoch's triples -> the teachers' margins for them; for a distilled student.
            on_validation: called with each row as it comes.

        Returns:
            One row a validation: ``epoch``, training means since the one before (or the call, if later), validation metrics (``val/<metric>``, and
            ``only/m/<metric>`` for a backbone of several modalities), ``gain`` (1 or 0) and ``seconds``.
        """
        rows: list[Values] = []
        last = self.max_epochs if epochs is None else min(self.max_epochs, self.epoch + epochs)
        pending, started = Means(), time.monotonic()
        while self.epoch < last and not self.stopping.stop:
            # Margins are of a whole epoch's triples; without them no more than one step's is held at a time.
            if sheets is None:
                self.trainer.train_epoch(self.epoch, into=pending)
            else:
                steps = self.trainer.stream.epoch(self.epoch, self.trainer.share)
                self.trainer.train_epoch(self.epoch, sheets(steps), steps, pending)
            self.epoch += 1
            if not validations_due(self.validate_every, self.max_epochs, self.epoch - 1, self.epoch):
                continue
            row = {"epoch": float(self.epoch), **with_effect_shares(pending.compute()), **validate(self.trainer)}
            gain = self.stopping.update(row[f"val/{METRIC}"], self.epoch)
            if gain:
                self.best = self.trainer.snapshot()
            row.update(gain=float(gain), seconds=time.monotonic() - started)
            pending, started = Means(), time.monotonic()
            rows.append(row)
            if on_validation:
                on_validation(row)
        return rows


def validations_due(validate_every: int, max_epochs: int, after: int, upto: int) -> list[int]:
    """Epochs at whose end a fit validates, beyond ``after`` and up to ``upto``: every so many, and the last of all."""
    return [epoch for epoch in range(after + 1, upto + 1) if epoch % validate_every == 0 or epoch == max_epochs]


def validate(trainer: Trainer) -> Values:
    """Validation metrics: the joint view's as ``val/<metric>``, each modality's as ``only/m/<metric>``."""
    values = trainer.diagnose(trainer.validation).compute()
    return {name if name.startswith("only/") else f"val/{name}": value for name, value in values.items()}


def with_effect_shares(values: Values) -> Values:
    """Add ``effect_share/m``: each modality's mean effect over the sum of all modalities'."""
    effects = {name.removeprefix("effect/"): value for name, value in values.items() if name.startswith("effect/")}
    return {**values, **{f"effect_share/{m}": effect / sum(effects.values()) for m, effect in effects.items()}}
