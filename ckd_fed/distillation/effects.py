"""Counterfactual causal effects of the modalities and the weights that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-8, 10.0


@torch.no_grad()
def causal_effects(joint: Tensor, without: Tensor, only: Tensor) -> Tensor:
    """Causal effect of every modality on every sample's margin.

    ``c_m = clamp((d_joint - d_without_m) / d_only_m, 1e-8, 10)``

    What taking m away costs, relative to what m achieves alone. A zero denominator counts as effect 0 before the clamp (the
    published code yields NaN for 0/0, which would poison the step).

    Args:
        joint: margins of the joint view, ``(B,)``.
        without: margins of ``without m``, ``(|M|, B)``.
        only: margins of ``only m``, ``(|M|, B)``.

    Returns:
        ``(|M|, B)`` in [1e-8, 10].
    """
    return ((joint - without) / only).masked_fill_(only == 0, 0.0).clamp_(LOWEST, HIGHEST)


@torch.no_grad()
def modality_weights(effects: Tensor, asked: Tensor | None = None) -> Tensor:
    """Weight of every modality's distillation loss on every sample: the smaller its effect, the larger its weight.

    ``w_m = |M| / (|M| - 1) * (1 - c_m / sum_k c_k)``

    The weights of a sample sum to |M|. For two modalities this is ``2 c_other / (c_m + c_other)``. M are the modalities that the
    sample's items have: one that was not asked has weight 0 there, and one that is alone has weight 1.

    Args:
        effects: ``(|M|, B)``, of at least two modalities.
        asked: which samples the teacher of each was asked about, ``(|M|, B)`` bool; None for all.

    Returns:
        ``(|M|, B)``.
    """
    if len(effects) < 2:
        raise ValueError(f"weights need at least two modalities, got {len(effects)}")
    if asked is None:
        return len(effects) / (len(effects) - 1) * (1 - effects / effects.sum(0))
    counted, n = effects * asked, asked.sum(0)
    weights = torch.where(n > 1, n / (n - 1).clamp(min=1) * (1 - counted / counted.sum(0)), 1.0)
    return torch.where(asked, weights, 0.0)
