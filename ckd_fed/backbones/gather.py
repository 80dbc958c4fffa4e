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


class DistinctItems(NamedTuple):
    """The items of both batches without repetitions.

    Attributes:
        rows: their numbers, ascending.
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
        self._distinct: DistinctItems | None = None

    def of_users(self, table: Tensor) -> Tensor:
        """Rows of both batches, ``(B + K, d)``."""
        return gather_rows(table, self.users)[0]

    def of_items(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the ranking batch, ``(2B, d)``, and differences of the distillation batch, ``(K, d)``."""
        return gather_rows(table, self.items, self.pairs)

    def distinct_items(self, n_items: int) -> DistinctItems:
        """The items of both batches without repetitions; found once a step, on a GPU by waiting for it."""
        if self._distinct is None:
            rows, (items, *pairs) = compacted(n_items, [self.items, *(self.pairs or ())])
            self._distinct = DistinctItems(rows, items, (pairs[0], pairs[1]) if pairs else None)
        return self._distinct

    def rows(self, users: Tensor, items: Tensor, difference: Tensor | None) -> Rows:
        """What :meth:`of_users` and :meth:`of_items` gave, put together."""
        # split, not slices: its backward is one concatenation, where every slice would fill a table of zeros
        by_user, (first, second) = users.split(self._sizes), items.split(self._sizes[0])
        return Rows(by_user[0], first, second, by_user[1] if len(by_user) > 1 else None, difference)


def gather_rows(table: Tensor, index: Tensor, pairs: Pairs | None = None) -> tuple[Tensor, Tensor | None]:
    """``table[index]``, and ``table[pairs[0]] - table[pairs[1]]`` where pairs are given; ``(n, d)`` each."""
    if table.device.type == "cpu":
        n = len(index) + sum(map(len, pairs or ()))
        sparse = table.is_leaf and table.numel() >= SPARSE_FROM and len(table) >= SPARSE_ROWS * n
        rows, difference = _Gather.apply(table, index, *(pairs or (None, None)), sparse)
        return rows, difference
    rows = F.embedding(index, table)
    return rows, None if pairs is None else F.embedding(pairs[0], table) - F.embedding(pairs[1], table)


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
        given = rows if rows is not None else difference
        if given is None:
            return None, None, None, None, None
        added = [(index, rows)] if rows is not None else []
        if difference is not None:
            added += [(first, difference), (second, -difference)]
        if not ctx.sparse:
            gradient = given.new_zeros(ctx.shape)
            for where, values in added:
                add_rows(gradient, where, values)
            return gradient, None, None, None, None
        read, positions = torch.cat([where for where, _ in added]).unique(return_inverse=True)
        gradient = given.new_zeros((len(read), *ctx.shape[1:]))
        for position, (_, values) in zip(positions.split([len(where) for where, _ in added]), added, strict=True):
            add_rows(gradient, position, values)
        return torch.sparse_coo_tensor(read[None], gradient, ctx.shape, is_coalesced=True, check_invariants=False), None, None, None, None


def margin(users: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """s(u, first) - s(u, second) from rows ``(n, d)``, shape ``(n,)``."""
    return (users * (first - second)).sum(-1)
