"""Backbones whose embeddings are concatenations of blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ckd_fed.backbones.base import Asked, Backbone, Embeddings, Pass, RankingBatch, StepOutput, View
from ckd_fed.backbones.gather import Gather, Rows


class BlockBackbone(Backbone):
    """A backbone that computes its tables block by block; views may share blocks.

    A subclass implements :meth:`blocks` in place of ``forward``. A step gathers the rows of each block once, whatever the number of
    views with it, and sums margins over blocks: the wide tables, whose gradients would be as wide, are never laid out.
    """

    @abstractmethod
    def blocks(self, views: Sequence[View]) -> Mapping[View, Sequence[Embeddings]]:
        """Blocks of each view, in their order; a block that several views share is one object."""

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables, ``(n, sum of the blocks' widths)``."""
        return Pass(
            {
                view: Embeddings(torch.cat([block.users for block in blocks], dim=1), torch.cat([block.items for block in blocks], dim=1))
                for view, blocks in self.blocks(views).items()
            }
        )

    def compute_step(self, asked: Asked) -> StepOutput:
        """As :meth:`Backbone.compute_step`, block by block."""
        views = self.blocks(asked.views)
        gather = Gather(asked.ranking, asked.distillation)
        rows: dict[int, Rows] = {}  # of each block
        ranked: dict[int, Tensor] = {}  # margins of each block
        distilled: dict[int, Tensor] = {}
        for block in (block for blocks in views.values() for block in blocks):
            if id(block) not in rows:
                of_block = rows[id(block)] = gather.rows(gather.of_users(block.users), *gather.of_items(block.items))
                ranked[id(block)] = of_block.ranking_margin()
                if asked.distillation is not None:
                    distilled[id(block)] = of_block.distillation_margin()
        output = StepOutput({}, {}, {})
        for view, blocks in views.items():
            if view in asked.ranking_views:
                output.ranking[view] = torch.stack([ranked[id(block)] for block in blocks]).sum(0)
            if view in asked.distillation_views:
                output.distillation[view] = torch.stack([distilled[id(block)] for block in blocks]).sum(0)
        user, first, second = (torch.cat(part, dim=1) for part in zip(*(rows[id(block)][:3] for block in views[self.joint]), strict=True))
        output.loss_terms = self.losses(RankingBatch(asked.ranking, output.ranking[self.joint], user, first, second))
        return output
