"""The two distillation losses of CKD (Zhang et al., ACM MM 2024, arXiv:2408.06360)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-8


def specific_loss(teacher_margin: Tensor, student_margin: Tensor) -> Tensor:
    """How far the student's ``only m`` view ranks a training triple less clearly than the teacher does, per sample.

    ``h_m[n] = max(0, d_teacher_m[n] - d_only_m[n])``

    Args:
        teacher_margin: ``(..., B)``, without gradient.
        student_margin: ``(..., B)``, the student's margins under ``only m``.

    Returns:
        ``(..., B)``, non-negative.
    """
    return (teacher_margin - student_margin).clamp(min=0)


def generic_loss(teacher_margin: Tensor, student_margin: Tensor, temperature: float, asked: Tensor | None = None) -> Tensor:
    """Cross-entropy between the teacher's and the student's pairwise preferences over random item pairs.

    ``p = sigmoid(d_teacher_m / t)``, ``q = sigmoid(d_only_m / t)``,
    ``g_m = mean(-p log(q + 1e-8) - (1 - p) log(1 - q + 1e-8))``

    Args:
        teacher_margin: ``(..., K)``, without gradient.
        student_margin: ``(..., K)``.
        temperature: t > 0.
        asked: which pairs the mean is over, ``(..., K)`` bool; None for all.

    Returns:
        ``(...)``; 0 where no pair is left.
    """
    loss: Tensor = _GenericLoss.apply(teacher_margin, student_margin, temperature, asked)
    return loss


class _GenericLoss(torch.autograd.Function):
    """One operation with its derivative, ``q (1 - q) / t * ((1 - p) / (1 - q + 1e-8) - p / (q + 1e-8))`` a pair: half of the operations."""

    @staticmethod
    def forward(ctx: Any, teacher_margin: Tensor, student_margin: Tensor, temperature: float, asked: Tensor | None) -> Tensor:
        p, q = (teacher_margin / temperature).sigmoid_(), (student_margin / temperature).sigmoid_()
        against, other = 1 - p, 1 - q
        sure, unsure = q + EPSILON, other + EPSILON
        pairs = (p * sure.log()).addcmul_(against, unsure.log())
        n = pairs.shape[-1] if asked is None else asked.sum(-1, keepdim=True).clamp(min=1)
        if asked is not None:
            pairs.mul_(asked)
        if student_margin.requires_grad:
            slope = against.div_(unsure).sub_(p.div_(sure)).mul_(q.mul_(other)).div_(temperature * n)
            ctx.save_for_backward(slope if asked is None else slope.mul_(asked))
        return pairs.div_(n).sum(-1).neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss: Tensor) -> tuple[None, Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return None, slope * loss.unsqueeze(-1), None, None
