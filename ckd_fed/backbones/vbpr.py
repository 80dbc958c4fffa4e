r"""VBPR: visual Bayesian personalised ranking, for any number of modalities (late fusion).

He, McAuley. "VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback". AAAI 2016, arXiv:1510.01784.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Asked, Backbone, Embeddings, Pass, RankingBatch, StepOutput, View, sum_of
from ckd_fed.backbones.block_margins import block_margins, summed
from ckd_fed.backbones.gather import Gather, Index
from ckd_fed.backbones.projection import narrow, pays, project, project_rows
from ckd_fed.data.interactions import Interactions


class VBPR(Backbone):
    r"""User and item embeddings are concatenations of an ID block and one block per modality.

    .. math:: e_u = [p_u \,|\, q_u^1 \,|\, q_u^2 \,|\dots], \quad e_i = [t_i \,|\, W_1 f_i^1 + b_1 \,|\, W_2 f_i^2 + b_2 \,|\dots]

    A score is a sum over blocks, so margins of all views follow from block margins: an absent block adds the same constant to
    every score of a user and cancels in every margin,

    .. math:: d_V(u,i,j) = d_{id} + \sum_{m \in V} d_m .

    A step therefore projects each modality once, whatever the number of views.

    Args:
        train, features, l2: see :class:`~ckd_fed.backbones.base.Backbone`.
        embedding_dim: width of each block; there is one for IDs and one a modality.

    Shapes:
        embeddings ``(n, (1 + number of modalities) * embedding_dim)``.
    """

    projects_features = True
    views_are_cheap = True
    static_steps = True

    def __init__(self, train: Interactions, features: Mapping[str, Tensor], *, embedding_dim: int = 64, l2: float = 1e-5) -> None:
        super().__init__(train, features, l2=l2)
        self.embedding_dim = embedding_dim
        self.user_embedding = nn.Parameter(torch.empty(self.n_users, embedding_dim))
        self.item_embedding = nn.Parameter(torch.empty(self.n_items, embedding_dim))
        self.preference = nn.ParameterDict({m: nn.Parameter(torch.empty(self.n_users, embedding_dim)) for m in self.modalities})
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], embedding_dim) for m, x in features.items()})
        for modality, matrix in features.items():
            self.register_buffer(f"features_{modality}", matrix, persistent=False)
            self.register_buffer(f"mean_features_{modality}", matrix.mean(0), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform embeddings and preferences, torch's default for the projections (as published)."""
        for table in (self.user_embedding, self.item_embedding, *self.preference.values()):
            nn.init.xavier_uniform_(table)
        for linear in self.projection.values():
            linear.reset_parameters()  # type: ignore[operator]

    def features(self, modality: str) -> Tensor:
        """Item features of a modality, ``(n_items, dimension)``."""
        return self.get_buffer(f"features_{modality}")

    @property
    def dense_work(self) -> float:
        return float(sum(self.features(m).numel() for m in self.modalities) * self.embedding_dim)

    @property
    def row_tables(self) -> dict[str, Literal["users", "items"]]:
        preferences: dict[str, Literal["users", "items"]] = {f"preference.{m}": "users" for m in self.modalities}
        return {"user_embedding": "users", "item_embedding": "items", **preferences}

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables, absent blocks included (as the published model lays them out)."""
        blocks: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        for modality in self.modalities:
            linear, preference = self.projection[modality], self.preference[modality]
            if any(modality in view for view in views):
                blocks[modality, True] = (preference, project(self.features(modality), linear))
            if any(modality not in view for view in views):
                mean = linear(self.get_buffer(f"mean_features_{modality}"))
                blocks[modality, False] = (preference.mean(0).expand(self.n_users, -1), mean.expand(self.n_items, -1))
        tables = {
            view: Embeddings(
                torch.cat([self.user_embedding, *(blocks[m, m in view][0] for m in self.modalities)], dim=1),
                torch.cat([self.item_embedding, *(blocks[m, m in view][1] for m in self.modalities)], dim=1),
            )
            for view in views
        }
        return Pass(tables)

    @torch.no_grad()
    def ranking_embeddings(self, views: Sequence[View]) -> dict[View, Embeddings]:
        """The ID block and the present blocks: absent ones shift all scores of a user alike."""
        items = {m: project(self.features(m), self.projection[m]) for m in self.modalities if any(m in view for view in views)}
        return {
            view: Embeddings(
                torch.cat([self.user_embedding, *(self.preference[m] for m in items if m in view)], dim=1),
                torch.cat([self.item_embedding, *(items[m] for m in items if m in view)], dim=1),
            )
            for view in views
        }

    def compute_step(self, asked: Asked) -> StepOutput:
        """Block margins, see the class docstring, from one gather a table over both batches."""
        gather = Gather(asked.ranking, asked.distillation)
        blocks: dict[str | None, tuple[Tensor, Tensor, Index]] = {None: (self.user_embedding, self.item_embedding, gather.items)}
        blocks.update({m: (self.preference[m], *self._projected(m, gather)) for m in self.modalities})
        done = [block_margins(users, items, gather.users, at) for users, items, at in blocks.values()]

        def of_views(views: Sequence[View], margins: Sequence[Tensor]) -> dict[View, Tensor]:
            present = [[number for number, block in enumerate(blocks) if block is None or block in view] for view in views]
            return dict(zip(views, summed(margins, present), strict=True))

        def joint_rows() -> list[Tensor]:
            rows = [gather.ranking_rows(*block) for block in blocks.values()]
            return [torch.cat(part, dim=1) for part in zip(*rows, strict=True)]

        margins = of_views(asked.ranking_views, [one.ranking for one in done])
        squares = sum_of(one.squares for one in done)
        batch = RankingBatch(asked.ranking, margins[self.joint], joint_rows, squares=squares)
        distilled = [one.distillation for one in done if one.distillation is not None]
        return StepOutput(self.losses(batch), margins, of_views(asked.distillation_views, distilled))

    def _projected(self, modality: str, gather: Gather) -> tuple[Tensor, Index]:
        """The projected features of all items, or of those that are asked for where that is faster, and where these are among them."""
        features, linear, n = self.features(modality), self.projection[modality], len(gather.items)
        in_place, some = narrow(features, linear), pays(features, n)
        if n >= self.n_items and (in_place or not some):
            return project(features, linear, lambda: gather.read_items(self.n_items)), gather.items
        rows, at = gather.own_items(once=some)
        if some or in_place:
            return project_rows(features, rows, linear), at
        return project(F.embedding(rows, features), linear), at
