"""Backbones whose embeddings are concatenations of blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ckd_fed.backbones.base import Asked, Backbone, Embeddings, Pass, RankingBatch, StepOutput, View
from ckd_fed.backbones.gather import BlockMargins, Gather, block_margins


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
        ranked = {key: one.ranking for key, one in done.items()}
        distilled = {key: one.distillation for key, one in done.items() if one.distillation is not None}
        joint = views[self.joint]

        def of_view(view: View, margins: Mapping[int, Tensor]) -> Tensor:
            return torch.stack([margins[id(block)] for block in views[view]]).sum(0)

        def joint_rows() -> list[Tensor]:
            rows = (gather.rows(gather.of_users(block.users), *gather.of_items(block.items))[:3] for block in joint)
            return [torch.cat(part, dim=1) for part in zip(*rows, strict=True)]

        margins = {view: of_view(view, ranked) for view in asked.ranking_views}
        squares = torch.stack([done[id(block)].squares for block in joint]).sum()
        batch = RankingBatch(asked.ranking, margins[self.joint], joint_rows, squares=squares)
        return StepOutput(self.losses(batch), margins, {view: of_view(view, distilled) for view in asked.distillation_views})
