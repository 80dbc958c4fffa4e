"""Torch's fused kernel of Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ckd_fed.training.drift import BETAS, EPS

Moved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # a parameter, its gradient, its two moments, and the number of its steps


def fused_adam(given: Sequence[Moved], learning_rate: float) -> None:
    """One update of some parameters, in place; their steps are counted."""
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = (list(of) for of in zip(*given, strict=True))
    torch._foreach_add_(steps, 1) if len(steps) > 1 else steps[0].add_(1)
    torch._fused_adam_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=learning_rate,
        weight_decay=0.0,
        eps=EPS,
        maximize=False,
    )
