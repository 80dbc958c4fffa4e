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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.block_margins import BlockMargins, block_margins
from ckd_fed.backbones.gather import Gather
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
class Pass:
    """One pass over the catalogue.

    Attributes:
        tables: view -> embedding tables.
        parts: whatever else of the joint view the backbone's own losses need.
    """

    tables: dict[View, Embeddings]
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class RankingBatch:
    """The ranking batch under the joint view, as the backbone's own losses see it.

    Attributes:
        triples: user, positive item i, negative item j.
        margin: s(u,i) - s(u,j), ``(B,)``.
        rows: of the joint tables, :attr:`users`, :attr:`positives` and :attr:`negatives`; or what gives them, called once at most.
        parts: of the :class:`Pass`.
        squares: sum of the squares of all these rows, where it is there without them; scalar.
    """

    triples: Triples
    margin: Tensor
    rows: Sequence[Tensor] | Callable[[], Sequence[Tensor]]
    parts: dict[str, Tensor] = field(default_factory=dict)
    squares: Tensor | None = None

    @cached_property
    def _rows(self) -> Sequence[Tensor]:
        return self.rows() if callable(self.rows) else self.rows

    @property
    def users(self) -> Tensor:
        """Rows of the users, ``(B, d)``."""
        return self._rows[0]

    @property
    def positives(self) -> Tensor:
        """Rows of the items i, ``(B, d)``."""
        return self._rows[1]

    @property
    def negatives(self) -> Tensor:
        """Rows of the items j, ``(B, d)``."""
        return self._rows[2]

    def half_squares(self) -> Tensor:
        """Half the sum of the rows' squares, divided by B: the published L2 term before its weight."""
        if self.squares is not None:
            return self.squares * (0.5 / max(1, len(self.triples)))
        return half_squares(self.users, self.positives, self.negatives)


@dataclass(frozen=True)
class Asked:
    """What is asked of a step.

    Attributes:
        ranking: the ranking batch (user, positive, negative).
        ranking_views: views whose ranking margins are wanted, the joint one first; each once.
        distillation: the distillation batch, or None.
        distillation_views: views whose distillation margins are wanted; none without a batch.
    """

    ranking: Triples
    ranking_views: tuple[View, ...]
    distillation: Triples | None
    distillation_views: tuple[View, ...]

    @property
    def views(self) -> list[View]:
        """All of them, the joint one first; each once."""
        return list(dict.fromkeys([*self.ranking_views, *self.distillation_views]))


@dataclass
class StepOutput:
    """What one training step needs from a backbone.

    Attributes:
        loss_terms: the backbone's own losses, term by term (scalars with gradient); their sum is minimised.
        ranking: view -> margins s(u,i) - s(u,j) of the ranking batch, ``(B,)``.
        distillation: view -> margins of the distillation batch, ``(K,)``; empty without one.
    """

    loss_terms: dict[str, Tensor]
    ranking: dict[View, Tensor]
    distillation: dict[View, Tensor]


class Backbone(nn.Module, ABC):
    """Base of every backbone.

    A subclass implements :meth:`forward` and :meth:`reset_parameters`. It may override :meth:`losses` where the published model is
    trained by other losses, :meth:`start_epoch` where something is drawn or rebuilt once an epoch, and :meth:`compute_step` where margins can
    be had without the full tables. A teacher is the same class built from one modality's features.

    Parameters are all that is trained and all that is saved; everything else is a buffer with ``persistent=False``, so a
    ``state_dict`` (which travels to the server) never holds a feature.

    Args:
        train: training interactions; their shape is the number of users and items.
        features: modality -> item features ``(n_items, dimension)``; the order is the backbone's order of modalities. Items that lack the
            modality have the mean of the others.
        present: modality -> which items have it, ``(n_items,)`` bool, of modalities that some lack; only for backbones that ask for it, as
            those do whose item graphs or losses would else be about items of which nothing is known.
        l2: weight lambda of the L2 term on the batch's joint embeddings.
    """

    #: Whether scores depend on features at all. Where they do not, every view is the same and all causal effects are 0 by construction.
    scores_use_features = True

    #: Whether features, the buffers ``features_<modality>``, are read by :func:`~ckd_fed.backbones.projection.project` and
    #: ``project_rows`` alone. Then they may be held in a narrower type than the parameters.
    projects_features = False

    #: Whether :meth:`ranking_embeddings` of one view after the other costs hardly more than of all at once. Then no two need be in memory.
    views_are_cheap = False

    #: Whether on a GPU all steps of an epoch but the first two are the same operations on the same memory: shapes that depend on the batches' sizes
    #: alone, nothing drawn, nothing that the host reads or uploads. Then ``training.cuda-graphs`` may record one and replay it.
    static_steps = False

    @property
    def row_tables(self) -> dict[str, Literal["users", "items"]]:
        """Parameters of which a step reads only the rows of its own users or items, by name, and of which of the two; none by default.

        Of such a table, where it is large, an optimiser need not move the other rows in every step. A wrong entry trains on outdated rows.
        """
        return {}

    @property
    def epoch_parameters(self) -> frozenset[str]:
        """Names of the parameters that have a gradient in the first step of an epoch alone; none by default.

        Of several students who share the steps of an epoch each still takes all of these parameters' steps, so their learning rate does not grow
        with the students' number.
        """
        return frozenset()

    def __init__(self, train: Interactions, features: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None, *, l2: float) -> None:
        super().__init__()
        self.n_users = train.n_users
        self.n_items = train.n_items
        self.modalities = tuple(features)
        self.l2 = l2
        self._constant: frozenset[View] = frozenset()
        lacking = {m: mask for m, mask in (present or {}).items() if m in features and not mask.all()}
        self.incomplete = tuple(lacking)
        for modality, mask in lacking.items():
            self.register_buffer(f"present_{modality}", mask, persistent=False)
            self.register_buffer(f"having_{modality}", mask.nonzero().squeeze(1), persistent=False)  # here, or every step would wait for it

    @property
    def joint(self) -> View:
        """The view with every modality present."""
        return frozenset(self.modalities)

    def only(self, modality: str) -> View:
        """The view with one modality present."""
        return frozenset([modality])

    @property
    def diagnosed(self) -> dict[str, View]:
        """Modality -> its ``only m`` view, of the modalities whose views are worth ranking: none where there is one modality, or where
        scores do not depend on features."""
        return {m: self.only(m) for m in self.modalities} if len(self.modalities) > 1 and self.scores_use_features else {}

    def without(self, modality: str) -> View:
        """The view with one modality absent."""
        return self.joint - {modality}

    def present(self, modality: str) -> Tensor | None:
        """Which items have the modality, ``(n_items,)`` bool; None where all have it."""
        return self.get_buffer(f"present_{modality}") if modality in self.incomplete else None

    def having(self, modality: str, rows: Tensor) -> Tensor:
        """The rows, of ``(n_items, d)``, of the items that have the modality."""
        return rows.index_select(0, self.get_buffer(f"having_{modality}")) if modality in self.incomplete else rows

    @property
    def dense_work(self) -> float:
        """Multiply-adds of the dense products in one pass over the catalogue; decides whether several CPU threads are worth it."""
        return math.inf

    @contextmanager
    def constant(self, views: Iterable[View]) -> Iterator[None]:
        """Within it, what belongs to these views alone may be computed without gradient."""
        before, self._constant = self._constant, frozenset(views)
        try:
            yield
        finally:
            self._constant = before

    def gradient(self, view: View) -> torch.set_grad_enabled:
        """A context for what belongs to one view alone: without gradient where the view is :meth:`constant`."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and view not in self._constant)

    @abstractmethod
    def forward(self, views: Sequence[View]) -> Pass:
        """Embedding tables of several views in one pass that shares their common work, with gradient.

        In training mode the joint view is among the views, and ``parts`` are those that :meth:`losses` reads.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every Parameter anew from torch's generator, as the published model does."""

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Called before an epoch's steps: forget or draw whatever lasts for one epoch (a pruned graph, a learned graph, dropout).

        Args:
            epoch: counts from 0.
            generator: on the CPU, seeded by run and epoch; all of the epoch's randomness must come from it, so that an epoch is the
                same wherever and whenever it is trained.
        """

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        r"""BPR and L2 (the published objective of VBPR, MMGCN and CKD), by name.

        .. math:: \frac1B\sum -\log\sigma(d(u,i,j)) + \frac{\lambda}{2B}\sum(|u|^2 + |i|^2 + |j|^2)
        """
        return {"bpr": bpr_loss(batch.margin), "l2": self.l2 * batch.half_squares()}

    def embed(self, views: Sequence[View]) -> dict[View, Embeddings]:
        """Full embedding tables of several views in one pass, with gradient."""
        return self(views).tables

    @torch.no_grad()
    def ranking_embeddings(self, views: Sequence[View]) -> dict[View, Embeddings]:
        """Detached tables whose inner products order a user's items as each view's scores do (constants may be left out)."""
        return {view: Embeddings(users.detach(), items.detach()) for view, (users, items) in self.embed(views).items()}

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
        views = tuple(dict.fromkeys([self.joint, *ranking_views]))
        return self.compute_step(Asked(ranking, views, distillation, tuple(distillation_views) if distillation is not None else ()))

    def compute_step(self, asked: Asked) -> StepOutput:
        """What :meth:`step` gives; overridden where it can be had for less than the full tables."""
        return self.read(self(asked.views), asked)

    def read(self, done: Pass, asked: Asked) -> StepOutput:
        """A step's output from a pass over its views; the triples index its tables."""
        gather = Gather(asked.ranking, asked.distillation)
        output = StepOutput({}, {}, {})
        found: dict[tuple[int, int], BlockMargins] = {}  # views may share their tables
        for view, (users, items) in done.tables.items():
            key = id(users), id(items)
            if key not in found:
                found[key] = block_margins(users, items, gather.users, gather.items)
            margins = found[key]
            if view in asked.ranking_views:
                output.ranking[view] = margins.ranking
            if view in asked.distillation_views:
                assert margins.distillation is not None
                output.distillation[view] = margins.distillation
            if view == self.joint:
                rows = partial(gather.ranking_rows, users, items, gather.items)
                output.loss_terms = self.losses(RankingBatch(asked.ranking, margins.ranking, rows, done.parts, margins.squares))
        return output


def bpr_loss(margin: Tensor) -> Tensor:
    r"""Bayesian personalised ranking, mean of :math:`-\log\sigma(d)` over ``(B,)`` (Rendle et al. 2009, arXiv:1205.2618); 0 where B is 0."""
    return -F.logsigmoid(margin).mean() if len(margin) else margin.sum()


def sum_of(scalars: Iterable[Tensor]) -> Tensor:
    """The sum of at least one scalar: as additions, which unlike a stack's sum have nothing to do in the backward pass."""
    return reduce(torch.add, scalars)


def half_squares(*rows: Tensor) -> Tensor:
    """Half the sum of squares of some ``(B, d)`` rows, divided by B: the published L2 term before its weight."""
    return sum_of(row.square().sum() for row in rows) * (0.5 / max(1, len(rows[0])))
