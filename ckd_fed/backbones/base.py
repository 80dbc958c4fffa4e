r"""The protocol of a multimodal backbone: user and item embeddings under several counterfactual views at once.

A *view* is the set of modalities that are present. A modality is made absent by replacing its item features with their mean over
all items and the users' preference for it (where the backbone has one) with its mean over all users; ID embeddings stay in every view.

=============  ==========================================
``joint``      every modality present
``only m``     every modality but m absent
``without m``  only m absent
=============  ==========================================

With two modalities ``without a`` and ``only b`` are the same view and are computed once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.data.interactions import Interactions

View = frozenset[str]


class Embeddings(NamedTuple):
    """Full embedding tables of one view: ``users`` (n_users, d) and ``items`` (n_items, d); a score is their inner product."""

    users: Tensor
    items: Tensor


class Triples(NamedTuple):
    """Index tensors of n triples, each ``(n,)`` int64: a user and two items (positive and negative, or j and k)."""

    users: Tensor
    first: Tensor
    second: Tensor

    def __len__(self) -> int:  # type: ignore[override]  # number of triples, not of fields
        return self.users.shape[0]


@dataclass
class StepOutput:
    """What one training step needs from a backbone.

    Attributes:
        loss_terms: the backbone's own recommendation loss, term by term (scalars with gradient); their sum is minimised.
        ranking: view -> margins s(u,i) - s(u,j) of the ranking batch, ``(B,)``.
        distillation: view -> margins of the distillation batch, ``(K,)``; empty without one.
    """

    loss_terms: dict[str, Tensor]
    ranking: dict[View, Tensor]
    distillation: dict[View, Tensor]


class Backbone(nn.Module, ABC):
    """Base of every backbone.

    A subclass implements :meth:`embed`. It may override :meth:`step` where margins can be had without the full tables, and
    :meth:`recommendation_loss` where the published model is trained by another loss. A teacher is the same class built from one
    modality's features.

    Args:
        train: training interactions; their shape is the number of users and items.
        features: modality -> item features ``(n_items, dimension)``; the order is the backbone's order of modalities.
        l2: weight lambda of the L2 term on the batch's joint embeddings.
    """

    def __init__(self, train: Interactions, features: Mapping[str, Tensor], *, l2: float) -> None:
        super().__init__()
        self.n_users = train.n_users
        self.n_items = train.n_items
        self.modalities = tuple(features)
        self.l2 = l2

    @property
    def joint(self) -> View:
        """The view with every modality present."""
        return frozenset(self.modalities)

    def only(self, modality: str) -> View:
        """The view with one modality present."""
        return frozenset([modality])

    def without(self, modality: str) -> View:
        """The view with one modality absent."""
        return self.joint - {modality}

    @property
    def dense_work(self) -> float:
        """Multiply-adds of the dense products in one pass over the catalogue; decides whether several CPU threads are worth it."""
        return math.inf

    @abstractmethod
    def embed(self, views: Sequence[View]) -> dict[View, Embeddings]:
        """Full embedding tables of several views in one pass, with gradient."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every Parameter anew from torch's generator, as the published model does."""

    @torch.no_grad()
    def ranking_embeddings(self, view: View) -> Embeddings:
        """Detached tables whose inner products order a user's items as the view's scores do (constants may be left out)."""
        embeddings = self.embed([view])[view]
        return Embeddings(embeddings.users.detach(), embeddings.items.detach())

    def recommendation_loss(self, margin: Tensor, users: Tensor, positives: Tensor, negatives: Tensor) -> dict[str, Tensor]:
        r"""BPR and L2 (the published objective of VBPR, MMGCN and CKD).

        .. math:: \frac1B\sum -\log\sigma(d(u,i,j)) + \frac{\lambda}{2B}\sum(|u|^2 + |i|^2 + |j|^2)

        Args:
            margin: joint margins, ``(B,)``.
            users, positives, negatives: joint embeddings of the batch, ``(B, d)`` each.
        """
        squares = users.square().sum() + positives.square().sum() + negatives.square().sum()
        return {"bpr": -F.logsigmoid(margin).mean(), "l2": self.l2 * 0.5 * squares / margin.shape[0]}

    def step(
        self,
        ranking: Triples,
        ranking_views: Sequence[View] = (),
        distillation: Triples | None = None,
        distillation_views: Sequence[View] = (),
    ) -> StepOutput:
        """Loss terms and margins of one step, sharing all work between the views.

        Args:
            ranking: the ranking batch (user, positive, negative).
            ranking_views: views whose ranking margins are wanted; the joint view is always computed.
            distillation: the distillation batch, or None.
            distillation_views: views whose distillation margins are wanted.
        """
        views = list(dict.fromkeys([self.joint, *ranking_views, *(distillation_views if distillation is not None else ())]))
        tables = self.embed(views)
        output = StepOutput({}, {}, {})
        for view in dict.fromkeys([self.joint, *ranking_views]):
            users, first, second = _rows(tables[view], ranking)
            output.ranking[view] = (users * (first - second)).sum(-1)
            if view == self.joint:
                output.loss_terms = self.recommendation_loss(output.ranking[view], users, first, second)
        if distillation is not None:
            for view in distillation_views:
                users, first, second = _rows(tables[view], distillation)
                output.distillation[view] = (users * (first - second)).sum(-1)
        return output


def _rows(tables: Embeddings, triples: Triples) -> tuple[Tensor, Tensor, Tensor]:
    return tables.users[triples.users], tables.items[triples.first], tables.items[triples.second]
