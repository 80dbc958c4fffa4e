"""What one block of the embeddings adds to a step: margins of both batches, and squares for the L2 term."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.backbones.gather import Index, Kind, differences, gather_rows
from ckd_fed.backbones.inverted import Inverted
from ckd_fed.kernels import Kernels, check_rows, kernels


class BlockMargins(NamedTuple):
    """What one block of the embeddings adds to a step.

    Attributes:
        ranking: to the margins of the ranking batch, ``(B,)``.
        distillation: to those of the distillation batch, ``(K,)``; None without one.
        squares: sum of the squares of the ranking batch's rows, user, first and second item; scalar.
    """

    ranking: Tensor
    distillation: Tensor | None
    squares: Tensor


def block_margins(users: Tensor, items: Tensor, of_users: Index, of_items: Index) -> BlockMargins:
    """Margins of one block from its tables; of float32 on a CPU by a compiled kernel where there is one.

    Args:
        users: ``(n_users, d)``.
        items: ``(n_items, d)``, or rows of some items.
        of_users, of_items: where both batches' are in them, as :class:`~ckd_fed.backbones.gather.Gather` has them.
    """
    compute = composed_margins if _compiled(users) is None else _BlockMargins.apply
    return BlockMargins(*compute(users, items, of_users, of_items))


def _compiled(table: Tensor) -> Kernels | None:
    return kernels() if table.device.type == "cpu" and table.dtype == torch.float32 else None


def composed_margins(users: Tensor, items: Tensor, of_users: Index, of_items: Index) -> tuple[Tensor, Tensor | None, Tensor]:
    """What :func:`block_margins` gives, of torch's own operations."""
    by_user, (ranked, difference) = gather_rows(users, of_users)[0], gather_rows(items, of_items)
    b = len(ranked) // 2
    mine, (first, second) = by_user.split([b, len(by_user) - b]), ranked.split(b)
    squares = mine[0].square().sum() + ranked.square().sum()
    return (mine[0] * (first - second)).sum(-1), None if difference is None else (mine[1] * difference).sum(-1), squares


@torch.no_grad()
def triple_margins(users: Tensor, items: Tensor, user: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Margins of triples from full tables, without gradient, ``(n,)``.

    Args:
        users, items: ``(n_users, d)`` and ``(n_items, d)``.
        user, first, second: of each triple, ``(n,)`` int64.

    Raises:
        IndexError: a row is not in its table.
    """
    compiled = _compiled(users)
    if compiled is not None:
        users, items, user, first, second = (tensor.contiguous() for tensor in (users, items, user, first, second))
        return compiled.margins(users, items, user, first, second)[0]
    apart = torch.stack([first, second], dim=1).view(-1)
    return F.embedding(user, users).mul_(differences(items, apart)).sum(-1)


def summed(margins: Sequence[Tensor], views: Sequence[Collection[int]]) -> list[Tensor]:
    """Margins of some views, each the sum of some blocks'.

    Args:
        margins: of each block, ``(n,)``.
        views: numbers of each view's blocks, at least one.

    Returns:
        of each view, ``(n,)``.
    """
    if not views:
        return []
    if margins[0].device.type == "cpu":
        return list(_Summed.apply(tuple(map(tuple, views)), *margins).unbind())
    return [torch.stack([margins[block] for block in view]).sum(0) for view in views]


class _Triples:
    """The triples of both batches as the kernels read them, and by their users and items; the same for all blocks with tables of some kinds.

    Args:
        compiled: the kernels.
        of_users, of_items: where both batches' are in the tables.
        users, items: the kinds of the tables' gradients.

    Raises:
        IndexError: a row is not in its table.
    """

    def __init__(self, compiled: Kernels, of_users: Index, of_items: Index, users: Kind, items: Kind) -> None:
        self._kernels = compiled
        self.size, self.ranked = len(of_users.rows), len(of_items.rows) // 2
        parts = of_items.rows.split(self.ranked) if self.ranked else (of_items.rows, of_items.rows)
        both = of_items.rows if of_items.pairs is None else torch.cat([part for pair in zip(parts, of_items.pairs, strict=True) for part in pair])
        self._user, self._first, self._second = of_users.rows.contiguous(), both[: self.size], both[self.size :]
        self._by_user, self._by_item = self._inverted(self._user, users), self._inverted(both, items)

    @staticmethod
    def _inverted(rows: Tensor, kind: Kind) -> Inverted:
        if not kind.sparse:
            return Inverted(rows, kind.n)
        check_rows(rows, kind.n)
        return Inverted(rows)

    def margins(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """s(u, first) - s(u, second) of all triples, ``(B + K,)``, and the squares' sum."""
        return self._kernels.margins(users, items, self._user, self._first, self._second, self.ranked)

    def gradients(self, users: Tensor, items: Tensor, margins: Tensor, squares: float) -> tuple[Tensor, Tensor]:
        """Gradients of the two tables from those of all margins, ``(B + K,)``, and of the squares' sum."""
        of_users = self._kernels.users_gradient(users, items, self._by_user, self._first, self._second, margins, self.ranked, squares)
        of_items = self._kernels.items_gradient(users, items, self._by_item, self._user, margins, self.ranked, squares)
        return self._by_user.table(of_users, len(users)), self._by_item.table(of_items, len(items))


class _BlockMargins(torch.autograd.Function):
    """With u_n, i_n, j_n the rows of a triple: r_n = u_n . (i_n - j_n) of both batches, and the sum of squares of the ranking batch's rows.

    Nothing but the tables is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, of_users: Index, of_items: Index) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        compiled = kernels()
        assert compiled is not None
        kinds = of_users.kind(users), of_items.kind(items)
        users, items = users.contiguous(), items.contiguous()
        ctx.triples = of_items.once((of_users, kinds), lambda: _Triples(compiled, of_users, of_items, *kinds))
        ctx.save_for_backward(users, items)
        margins, squares = ctx.triples.margins(users, items)
        b = ctx.triples.ranked
        return margins[:b], None if of_items.pairs is None else margins[b:], squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ranking: Tensor | None, distillation: Tensor | None, squares: Tensor | None) -> tuple[Tensor | None, ...]:
        users, items = ctx.saved_tensors
        b = ctx.triples.ranked
        parts = [users.new_zeros(n) if part is None else part for n, part in ((b, ranking), (ctx.triples.size - b, distillation))]
        return *ctx.triples.gradients(users, items, torch.cat(parts), 0.0 if squares is None else float(squares)), None, None


class _Summed(torch.autograd.Function):
    """One operation in place of one for every view and block, forward and backward."""

    @staticmethod
    def forward(ctx: Any, views: tuple[tuple[int, ...], ...], *margins: Tensor) -> Tensor:
        ctx.views, ctx.blocks = views, len(margins)
        sums = margins[0].new_empty((len(views), len(margins[0])))
        for of_view, (first, *others) in zip(sums, views, strict=True):
            if not others:
                of_view.copy_(margins[first])
                continue
            torch.add(margins[first], margins[others[0]], out=of_view)
            for other in others[1:]:
                of_view += margins[other]
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor | None, ...]:
        of_blocks: list[Tensor | None] = [None] * ctx.blocks
        for gradient, view in zip(sums, ctx.views, strict=True):
            for block in view:
                before = of_blocks[block]
                of_blocks[block] = gradient if before is None else before + gradient
        return None, *of_blocks
