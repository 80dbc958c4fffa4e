"""A fit's whole state as named arrays and JSON-able values: what training needs in order to go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ckd_fed.checkpoint import to_arrays, to_tensors
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.training.fit import Fit


def fit_state(fit: Fit, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parameters, the optimiser's state and the best parameters, their names prefixed; and epoch and early stopping."""
    arrays = {
        **to_arrays(fit.trainer.snapshot(), f"{prefix}parameter/"),
        **to_arrays(fit.trainer.optimizer.state(), f"{prefix}optimizer/"),
        **to_arrays(fit.best, f"{prefix}best/"),
    }
    return arrays, {"epoch": fit.epoch, "stopping": {**asdict(fit.stopping), "best": fit.stopping.best if fit.best else None}}


def restore_fit(fit: Fit, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any], prefix: str = "") -> None:
    """Put a fit into the state that :func:`fit_state` gave.

    Raises:
        KeyError, TypeError, RuntimeError, ValueError: the state is incomplete, or of another model.
    """
    fit.trainer.restore(to_tensors(arrays, f"{prefix}parameter/"))
    fit.trainer.optimizer.load_state(to_tensors(arrays, f"{prefix}optimizer/"))
    fit.best = to_tensors(arrays, f"{prefix}best/")
    stopping = dict(values["stopping"])
    fit.stopping = EarlyStopping(**{**stopping, "best": float("-inf") if stopping["best"] is None else stopping["best"]})
    fit.epoch = int(values["epoch"])
