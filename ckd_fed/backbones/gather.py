"""The rows of tables that a step's two batches need, and the margins that are made of them.

The distillation batch needs differences of item rows and not the rows: they are taken by one kernel, and the gradient of all that is
gathered from a table is added up in one table of zeros. On a CPU a gather with its backward takes 0.85 ms where
torch's own operations take 1.5 (5,000 pairs of 6,710 rows, d = 64), because each of those lays out rows and fills a table. The gradient of
a parameter that is much larger than what is read of it is sparse: the rows that were read and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ckd_fed.backbones.base import Triples

Pairs = tuple[Tensor, Tensor]
SPARSE_FROM = 1 << 21  # numbers of a table: 8 MB in float32
SPARSE_ROWS = 24  # a row that is read for so many in the table


class Rows(NamedTuple):
    """What the margins of one view, or of one block of it, are made of.

    Attributes:
        users, first, second: of the ranking batch, ``(B, d)`` each.
        distillation_users: of the distillation batch, ``(K, d)``; None without one.
        difference: first minus second items of the distillation batch, ``(K, d)``; None without one.
    """

    users: Tensor
    first: Tensor
    second: Tensor
    distillation_users: Tensor | None
    difference: Tensor | None

    def ranking_margin(self) -> Tensor:
        """s(u,i) - s(u,j), ``(B,)``."""
        return margin(self.users, self.first, self.second)

    def distillation_margin(self) -> Tensor:
        """s(u,j) - s(u,k), ``(K,)``.

        Raises:
            ValueError: there is no distillation batch.
        """
        if self.distillation_users is None or self.difference is None:
            raise ValueError("there is no distillation batch")
        return (self.distillation_users * self.difference).sum(-1)


class ItemRows(NamedTuple):
    """Which items' rows a table holds that is made for a step, and where the batches' items are in it.

    Attributes:
        rows: numbers of the items.
        items, pairs: those of :class:`Gather`, as positions among the rows.
    """

    rows: Tensor
    items: Tensor
    pairs: Pairs | None


class Gather:
    """Both batches of a step as one gather a table.

    Args:
        ranking: the ranking batch, B triples.
        distillation: the distillation batch, K triples, or None.

    Attributes:
        users: ``(B + K,)``.
        items: of the ranking batch, ``(2B,)``: first items, then second ones.
        pairs: items of the distillation batch, ``(K,)`` each; None without one.
    """

    def __init__(self, ranking: Triples, distillation: Triples | None) -> None:
        batches = [ranking] if distillation is None else [ranking, distillation]
        self._sizes = [len(batch) for batch in batches]
        self.users = torch.cat([batch.users for batch in batches])
        self.items = torch.cat([ranking.first, ranking.second])
        self.pairs: Pairs | None = None if distillation is None else (distillation.first, distillation.second)
        self._distinct: ItemRows | None = None

    def of_users(self, table: Tensor) -> Tensor:
        """Rows of both batches, ``(B + K, d)``."""
        return gather_rows(table, self.users)[0]

    def of_items(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the ranking batch, ``(2B, d)``, and differences of the distillation batch, ``(K, d)``."""
        return gather_rows(table, self.items, self.pairs)

    def distinct_items(self, n_items: int) -> ItemRows:
        """The items of both batches without repetitions, ascending; found once a step, on a GPU by waiting for it."""
        if self._distinct is None:
            rows, (items, *pairs) = compacted(n_items, [self.items, *(self.pairs or ())])
            self._distinct = ItemRows(rows, items, (pairs[0], pairs[1]) if pairs else None)
        return self._distinct

    def all_items(self) -> ItemRows:
        """The items of both batches as they come."""
        indices = [self.items, *(self.pairs or ())]
        rows = torch.cat(indices)
        items, *pairs = torch.arange(len(rows), device=rows.device).split([len(index) for index in indices])
        return ItemRows(rows, items, (pairs[0], pairs[1]) if pairs else None)

    def rows(self, users: Tensor, items: Tensor, difference: Tensor | None) -> Rows:
        """What :meth:`of_users` and :meth:`of_items` gave, put together."""
        # split, not slices: its backward is one concatenation, where every slice would fill a table of zeros
        by_user, (first, second) = users.split(self._sizes), items.split(self._sizes[0])
        return Rows(by_user[0], first, second, by_user[1] if len(by_user) > 1 else None, difference)


def gather_rows(table: Tensor, index: Tensor, pairs: Pairs | None = None) -> tuple[Tensor, Tensor | None]:
    """``table[index]``, and ``table[pairs[0]] - table[pairs[1]]`` where pairs are given; ``(n, d)`` each."""
    if table.device.type == "cpu":
        sparse = _sparse(table, len(index) + sum(map(len, pairs or ())))
        rows, difference = _Gather.apply(table, index, *(pairs or (None, None)), sparse)
        return rows, difference
    rows = F.embedding(index, table)
    return rows, None if pairs is None else F.embedding(pairs[0], table) - F.embedding(pairs[1], table)


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


def block_margins(users: Tensor, items: Tensor, gather: Gather, at: ItemRows | None = None) -> BlockMargins:
    """Margins of one block from its tables.

    One operation with its own backward, which makes a step of VBPR on TikTok a twelfth faster than margins of gathered rows do (CPU, one and two
    threads): nothing is split or joined on the way back, and squares cost one pass each way.

    Args:
        users: ``(n_users, d)``.
        items: ``(n_items, d)``, or rows of some items.
        gather: the step's batches.
        at: which items; None for all.
    """
    index, pairs = (gather.items, gather.pairs) if at is None else (at.items, at.pairs)
    first, second = pairs or (None, None)
    sparse = _sparse(users, len(gather.users)), _sparse(items, len(index) + sum(map(len, pairs or ())))
    return BlockMargins(*_BlockMargins.apply(users, items, gather.users, index, first, second, *sparse))


def compacted(n: int, indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The distinct numbers of some index tensors in ascending order, and the indices as positions among these.

    Args:
        n: all numbers are below it.
        indices: of any shapes.
    """
    found = torch.zeros(n, dtype=torch.bool, device=indices[0].device)
    for index in indices:
        found[index] = True
    position = found.cumsum(0) - 1
    return found.nonzero().squeeze(1), [position[index] for index in indices]


def differences(table: Tensor, pairs: Pairs) -> Tensor:
    """``table[pairs[0]] - table[pairs[1]]`` without gradient, ``(n, d)``."""
    if table.device.type != "cpu":
        return table[pairs[0]] - table[pairs[1]]
    # A bag of the two rows with weights 1 and -1: the same bits, and neither row is laid out.
    starts, signs = _bags_of_two(len(pairs[0]), table.dtype)
    return F.embedding_bag(torch.stack(pairs, dim=1).view(-1), table.detach(), starts, mode="sum", per_sample_weights=signs)


@lru_cache(maxsize=16)
def _bags_of_two(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where each of n bags starts, and the weights of what is in them; the same in every step, and as dear to make as the bags' sums."""
    return torch.arange(0, 2 * n, 2), torch.tensor([1.0, -1.0], dtype=dtype).repeat(n)


def add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """``table[index] += rows``, in the order of the index: what ``index_add_`` gives, whose general path takes three times as long."""
    table.scatter_add_(0, index.unsqueeze(1).expand_as(rows), rows)


def _sparse(table: Tensor, n: int) -> bool:
    """Whether the gradient of a table of which n rows are read is sparse."""
    return table.device.type == "cpu" and table.is_leaf and table.numel() >= SPARSE_FROM and len(table) >= SPARSE_ROWS * n


def _added_up(shape: torch.Size, sparse: bool, added: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of a table to some rows of which something is added: (index, rows) in their order."""
    like = added[0][1]
    if not sparse:
        gradient = like.new_zeros(shape)
        for index, rows in added:
            add_rows(gradient, index, rows)
        return gradient
    read, positions = torch.cat([index for index, _ in added]).unique(return_inverse=True)
    gradient = like.new_zeros((len(read), *shape[1:]))
    for position, (_, rows) in zip(positions.split([len(index) for index, _ in added]), added, strict=True):
        add_rows(gradient, position, rows)
    return torch.sparse_coo_tensor(read[None], gradient, shape, is_coalesced=True, check_invariants=False)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, first: Tensor | None, second: Tensor | None, sparse: bool) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, first, second)
        ctx.shape, ctx.sparse = table.shape, sparse
        return F.embedding(index, table), None if first is None or second is None else differences(table, (first, second))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, rows: Tensor | None, difference: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        index, first, second = ctx.saved_tensors
        added = [(index, rows)] if rows is not None else []
        if difference is not None:
            added += [(first, difference), (second, -difference)]
        return _added_up(ctx.shape, ctx.sparse, added) if added else None, None, None, None, None


class _BlockMargins(torch.autograd.Function):
    """With u_n, i_n, j_n the rows of a batch: r_n = u_n . (i_n - j_n) of both batches, and the sum of squares of the ranking batch's."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, at: Tensor, index: Tensor, first: Tensor | None, second: Tensor | None, *sparse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        of_users, of_items = F.embedding(at, users), F.embedding(index, items)
        n = len(index) // 2
        apart = of_items[:n] - of_items[n:]
        difference = None if first is None or second is None else differences(items, (first, second))
        ctx.save_for_backward(at, index, first, second, of_users, of_items, apart, difference)
        ctx.shapes, ctx.sparse = (users.shape, items.shape), sparse
        squares = torch.stack([torch.dot(rows.reshape(-1), rows.reshape(-1)) for rows in (of_users[:n], of_items)]).sum()
        ranking = (of_users[:n] * apart).sum(-1)
        return ranking, None if difference is None else (of_users[n:] * difference).sum(-1), squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ranking: Tensor | None, distillation: Tensor | None, squares: Tensor | None) -> tuple[Tensor | None, ...]:
        at, index, first, second, of_users, of_items, apart, difference = ctx.saved_tensors
        n = len(index) // 2
        twice = of_users.new_zeros(()) if squares is None else 2 * squares
        to_users, to_items = torch.empty_like(of_users), of_items * twice
        torch.mul(of_users[:n], twice, out=to_users[:n])
        if ranking is not None:
            signal = ranking.unsqueeze(1)
            to_users[:n].addcmul_(apart, signal)
            by_user = of_users[:n] * signal
            to_items[:n] += by_user
            to_items[n:] -= by_user
        added = [(index, to_items)]
        if distillation is None:
            at, to_users = at[:n], to_users[:n]
        else:
            signal = distillation.unsqueeze(1)
            torch.mul(difference, signal, out=to_users[n:])
            by_user = of_users[n:] * signal
            added += [(first, by_user), (second, -by_user)]
        users_shape, items_shape = ctx.shapes
        users_sparse, items_sparse = ctx.sparse
        gradients = _added_up(users_shape, users_sparse, [(at, to_users)]), _added_up(items_shape, items_sparse, added)
        return *gradients, None, None, None, None, None, None


def margin(users: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """s(u, first) - s(u, second) from rows ``(n, d)``, shape ``(n,)``."""
    return (users * (first - second)).sum(-1)
