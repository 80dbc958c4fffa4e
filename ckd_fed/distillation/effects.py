"""Counterfactual causal effects of the modalities and the weights that follow from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-8, 10.0


@torch.no_grad()
def causal_effects(joint: Tensor, without: Mapping[str, Tensor], only: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Causal effect of every modality on every sample's margin.

    ``c_m = clamp((d_joint - d_without_m) / d_only_m, 1e-8, 10)``

    What taking m away costs, relative to what m achieves alone. A zero denominator counts as effect 0 before the clamp (the
    published code yields NaN for 0/0, which would poison the step).

    Args:
        joint: margins of the joint view, ``(B,)``.
        without: modality -> margins of ``without m``, ``(B,)``.
        only: modality -> margins of ``only m``, ``(B,)``.

    Returns:
        Modality -> ``(B,)`` in [1e-8, 10].
    """
    effects = {}
    for modality, alone in only.items():
        ratio = (joint - without[modality]) / alone
        effects[modality] = torch.where(alone == 0, 0.0, ratio).clamp(LOWEST, HIGHEST)
    return effects


@torch.no_grad()
def modality_weights(effects: Mapping[str, Tensor], asked: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weight of every modality's distillation loss on every sample: the smaller its effect, the larger its weight.

    ``w_m = |M| / (|M| - 1) * (1 - c_m / sum_k c_k)``

    The weights of a sample sum to |M|. For two modalities this is ``2 c_other / (c_m + c_other)``. M are the modalities that the
    sample's items have: one that was not asked has weight 0 there, and one that is alone has weight 1.

    Args:
        effects: modality -> ``(B,)``, at least two modalities.
        asked: modality -> which samples its teacher was asked about, ``(B,)`` bool; a modality that is not named was asked about all.
    """
    if len(effects) < 2:
        raise ValueError(f"weights need at least two modalities, got {list(effects)}")
    if not asked:
        total = torch.stack(list(effects.values())).sum(0)
        scale = len(effects) / (len(effects) - 1)
        return {modality: scale * (1 - effect / total) for modality, effect in effects.items()}
    present = torch.stack(
        [asked[modality] if modality in asked else torch.ones_like(effect, dtype=torch.bool) for modality, effect in effects.items()]
    )
    counted = torch.stack(list(effects.values())) * present  # (|M|, B)
    n = present.sum(0)
    weights = torch.where(n > 1, n / (n - 1).clamp(min=1) * (1 - counted / counted.sum(0)), 1.0)
    return dict(zip(effects, torch.where(present, weights, 0.0).unbind(), strict=True))
