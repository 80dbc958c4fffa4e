r"""Calibrated inference: how to read a distilled student out.

A student can be ranked by any of its views, and the joint one, the plain sum of everything, need not be the best use of what it has
learnt. Here the score is a weighted sum over views,

.. math:: s(u,i) = \sum_V w_V\, s_V(u,i),

with the weights fitted on validation: those under which the held-out items are most likely among all items that the user has not
seen (a conditional logit, McFadden 1974: convex, one number a view, no grid and no random choice),

.. math:: \min_w \; -\frac1n \sum_{(u,i)} \Big( s(u,i) - \log\sum_{j \notin T_u} e^{s(u,j)} \Big).

An inner product of concatenated tables gives the weighted sum again, so ranking costs one table whatever the number of views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Embeddings, View
from ckd_fed.data.interactions import Interactions
from ckd_fed.evaluation.ranking import entries, score_blocks

_MOST_USERS = 8192  # enough to fit a handful of weights, few enough to be quick on any catalogue
_ITERATIONS = 25


@dataclass(frozen=True)
class Calibration:
    """Weights of views, fitted on validation.

    Attributes:
        weights: view -> weight; views of weight 0 are left out.
        log_likelihood: mean log-probability of a held-out item under the weights, for comparing fits.
    """

    weights: dict[View, float]
    log_likelihood: float

    def named(self, backbone: Backbone) -> dict[str, float]:
        """Weights by the views' names: ``joint``, ``only text``."""
        return {view_name(backbone, view): weight for view, weight in self.weights.items()}


def calibration_views(backbone: Backbone) -> list[View]:
    """The views that calibration weighs: joint, then ``only m`` of every modality; the joint one alone where they do not differ."""
    return [backbone.joint, *backbone.diagnosed.values()]


def view_name(backbone: Backbone, view: View) -> str:
    """``joint`` or ``only m``."""
    return "joint" if view == backbone.joint else f"only {' and '.join(m for m in backbone.modalities if m in view) or 'IDs'}"


def combine(tables: Mapping[View, Embeddings], weights: Mapping[View, float]) -> Embeddings:
    """One table whose inner products are the weighted sum of the views' scores, ``(n, sum of the views' widths)``."""
    return Embeddings(
        torch.cat([weight * tables[view].users for view, weight in weights.items()], dim=1),
        torch.cat([tables[view].items for view in weights], dim=1),
    )


@torch.no_grad()
def calibrate(tables: Mapping[View, Embeddings], train: Interactions, held_out: Interactions) -> Calibration:
    """Fit the weights of views on held-out interactions by Newton's method.

    Args:
        tables: view -> tables; the first is the starting point.
        train: items to leave out.
        held_out: validation interactions; never the test ones.

    Returns:
        The fit; the first view alone where there is nothing to fit.
    """
    views = list(tables)
    users = held_out.users
    if len(users) > _MOST_USERS:
        users = users[np.linspace(0, len(users) - 1, _MOST_USERS).astype(np.int64)]
    device = tables[views[0]].users.device
    weights = torch.zeros(len(views), dtype=torch.float64, device=device)
    if not len(users):
        return Calibration({views[0]: 1.0}, float("nan"))
    # In units of each view's own spread, so that one starting point and one damping fit all of them.
    scale = torch.stack([_spread(tables[view]) for view in views]).double()
    weights[0] = 1.0
    value, gradient, hessian = _derivatives(tables, weights / scale, train, held_out, users)
    for _ in range(_ITERATIONS):
        gradient, hessian = gradient / scale, hessian / scale[:, None] / scale
        step = torch.linalg.solve(hessian + 1e-6 * torch.eye(len(views), dtype=torch.float64, device=device), gradient)
        if float(gradient @ step) < 1e-8:  # half the gain that is left, in nats an item
            break
        size = 1.0
        while True:  # the likelihood is concave: a step short enough always gains
            trial = weights + size * step
            better = _derivatives(tables, trial / scale, train, held_out, users)
            if better[0] > value or size < 1e-3:
                break
            size /= 2
        if better[0] <= value:
            break
        weights, (value, gradient, hessian) = trial, better
    return Calibration({view: float(weight) for view, weight in zip(views, weights / scale, strict=True)}, value)


def _spread(table: Embeddings) -> Tensor:
    """Standard deviation of a view's scores over items, averaged over users, from the second moment of its items."""
    centred = table.items - table.items.mean(0)
    covariance = centred.T @ centred / len(centred)
    return ((table.users @ covariance) * table.users).sum(-1).clamp(min=0).sqrt().mean().clamp(min=1e-12)


def _derivatives(
    tables: Mapping[View, Embeddings], weights: Tensor, train: Interactions, held_out: Interactions, users: np.ndarray
) -> tuple[float, Tensor, Tensor]:
    """Mean log-likelihood, its gradient ``(V,)`` and minus its Hessian ``(V, V)``, over the held-out items of some users."""
    n_views = len(tables)
    value = torch.zeros((), dtype=torch.float64, device=weights.device)
    gradient, hessian = torch.zeros_like(weights), weights.new_zeros((n_views, n_views))
    total = 0
    for chunk, seen, scores in score_blocks(list(tables.values()), train, users):
        row, item = entries(held_out, chunk, weights.device)
        combined = torch.stack([weight * score for weight, score in zip(weights.to(scores[0].dtype), scores, strict=True)]).sum(0)  # (b, n_items)
        combined[seen] = -torch.inf
        log_total = combined.logsumexp(1)
        probability = (combined - log_total[:, None]).exp()
        mean = torch.stack([(probability * score).sum(1) for score in scores], dim=1).double()  # (b, V)
        counts = torch.bincount(row, minlength=len(chunk)).double()
        value += (combined[row, item].double() - log_total[row].double()).sum()
        gradient += torch.stack([score[row, item].double().sum() for score in scores]) - (counts[:, None] * mean).sum(0)
        for a in range(n_views):
            for b in range(a, n_views):
                second = (probability * scores[a] * scores[b]).sum(1).double() - mean[:, a] * mean[:, b]
                hessian[a, b] += (counts * second).sum()
                hessian[b, a] = hessian[a, b]
        total += len(row)
    return float(value) / total, gradient / total, hessian / total
