"""The two distillation losses of CKD (Zhang et al., ACM MM 2024, arXiv:2408.06360)."""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-8


def specific_loss(teacher_margin: Tensor, student_margin: Tensor) -> Tensor:
    """How far the student's ``only m`` view ranks a training triple less clearly than the teacher does, per sample.

    ``h_m[n] = max(0, d_teacher_m[n] - d_only_m[n])``

    Args:
        teacher_margin: ``(B,)``, without gradient.
        student_margin: ``(B,)``, the student's margins under ``only m``.

    Returns:
        ``(B,)``, non-negative.
    """
    return (teacher_margin - student_margin).clamp(min=0)


def generic_loss(teacher_margin: Tensor, student_margin: Tensor, temperature: float, asked: Tensor | None = None) -> Tensor:
    """Cross-entropy between the teacher's and the student's pairwise preferences over random item pairs.

    ``p = sigmoid(d_teacher_m / t)``, ``q = sigmoid(d_only_m / t)``,
    ``g_m = mean(-p log(q + 1e-8) - (1 - p) log(1 - q + 1e-8))``

    Args:
        teacher_margin: ``(K,)``, without gradient.
        student_margin: ``(K,)``.
        temperature: t > 0.
        asked: which pairs the mean is over, ``(K,)`` bool; None for all.

    Returns:
        Scalar; 0 where no pair is left.
    """
    p = (teacher_margin / temperature).sigmoid()
    q = (student_margin / temperature).sigmoid()
    pairs = -(p * (q + EPSILON).log() + (1 - p) * (1 - q + EPSILON).log())
    return pairs.mean() if asked is None else (pairs * asked).sum() / asked.sum().clamp(min=1)
