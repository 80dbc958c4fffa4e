"""Backbones whose embeddings are concatenations of blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ckd_fed.backbones.base import Asked, Backbone, Embeddings, Pass, RankingBatch, StepOutput, View, sum_of
from ckd_fed.backbones.block_margins import BlockMargins, block_margins, summed
from ckd_fed.backbones.gather import Gather


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
        done: dict[int, BlockMargins] = {}
        for block in (block for blocks in views.values() for block in blocks):
            if id(block) not in done:
                done[id(block)] = block_margins(block.users, block.items, gather.users, gather.items)
        numbers = {key: number for number, key in enumerate(done)}
        joint = views[self.joint]

        def of_views(asked_for: Sequence[View], margins: Sequence[Tensor]) -> dict[View, Tensor]:
            blocks = [[numbers[id(block)] for block in views[view]] for view in asked_for]
            return dict(zip(asked_for, summed(margins, blocks), strict=True))

        def joint_rows() -> list[Tensor]:
            rows = [gather.ranking_rows(block.users, block.items, gather.items) for block in joint]
            return [torch.cat(part, dim=1) for part in zip(*rows, strict=True)]

        margins = of_views(asked.ranking_views, [one.ranking for one in done.values()])
        squares = sum_of(done[id(block)].squares for block in joint)
        batch = RankingBatch(asked.ranking, margins[self.joint], joint_rows, squares=squares)
        distilled = [one.distillation for one in done.values() if one.distillation is not None]
        return StepOutput(self.losses(batch), margins, of_views(asked.distillation_views, distilled))
