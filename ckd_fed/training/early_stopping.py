"""Early stopping on a validation metric."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """A strictly greater value is a gain; stop when more than ``patience`` validations in a row brought none.

    With the published patience of 10, training stops at the 11th validation in a row without a gain.

    Attributes:
        patience: validations without a gain that are tolerated.
        best: best value so far, -inf before the first.
        best_epoch: epoch of the best value, -1 before the first.
        waited: validations since the last gain.
    """

    patience: int
    best: float = -math.inf
    best_epoch: int = -1
    waited: int = 0

    def update(self, value: float, epoch: int) -> bool:
        """Take in a validation and return whether it was a gain."""
        if value > self.best:
            self.best, self.best_epoch, self.waited = value, epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def stop(self) -> bool:
        return self.waited > self.patience
