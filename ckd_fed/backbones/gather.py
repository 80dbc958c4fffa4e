"""The rows of tables that a step's two batches need, and the margins that are made of them.

The distillation batch needs differences of item rows and not the rows: they are taken by one kernel, and the gradient of all that is
gathered from a table is summed by the inverted index (:mod:`ckd_fed.backbones.inverted`) that the step shares between its tables. The gradient of
a parameter that is much larger than what is read of it is sparse: the rows that were read and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.backbones.inverted import Inverted, compacted, distinct
from ckd_fed.kernels import kernels

if TYPE_CHECKING:
    from ckd_fed.backbones.base import Triples

Pairs = tuple[Tensor, Tensor]
T = TypeVar("T")
SPARSE_FROM = 1 << 21  # numbers of a table: 8 MB in float32
SPARSE_ROWS = 24  # a row that is read for so many in the table
_SOONER = 3  # so many times, where compiled kernels move the rows


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


class Index:
    """What is read of a table: rows, and differences of two rows.

    Args:
        rows: ``(n,)`` int64.
        pairs: first and second rows of the differences, ``(k,)`` each.
    """

    def __init__(self, rows: Tensor, pairs: Pairs | None = None) -> None:
        self.rows = rows
        self.pairs = pairs
        self._found: dict[Hashable, Any] = {}
        self._size = sum(map(len, self.parts))

    @classmethod
    def of_parts(cls, parts: Sequence[Tensor]) -> Index:
        """From what :attr:`parts` gives."""
        return cls(parts[0], (parts[1], parts[2]) if len(parts) > 1 else None)

    @cached_property
    def apart(self) -> Tensor:
        """First and second row of each difference, side by side, ``(2 k,)``."""
        assert self.pairs is not None
        return torch.stack(self.pairs, dim=1).view(-1)

    @property
    def parts(self) -> list[Tensor]:
        """Rows, and first and second rows of the differences where there are any."""
        return [self.rows, *(self.pairs or ())]

    def __len__(self) -> int:
        """How many rows of a table are read."""
        return self._size

    def kind(self, table: Tensor) -> Kind:
        """Of a table's gradient."""
        sooner = _SOONER if kernels() and table.dtype == torch.float32 else 1
        sparse = table.is_leaf and sooner * table.numel() >= SPARSE_FROM and sooner * len(table) >= SPARSE_ROWS * len(self)
        return Kind(len(table), table.dtype, sparse)

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What is found of the index once, for all tables that it is read of."""
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    def gradient(self, kind: Kind) -> _Gradient:
        """How a table's gradient follows from that of what is read. On the CPU."""
        return self.once(kind, lambda: _Gradient(self, kind))


class Kind(NamedTuple):
    """Of a gradient: rows of its table, its type, and whether it is sparse."""

    n: int
    dtype: torch.dtype
    sparse: bool


class _Gradient:
    """The gradient of a table as sums over what is read of it: of a difference for its first row and against its second.

    Args:
        index: what is read.
        kind: of gradient.
    """

    def __init__(self, index: Index, kind: Kind) -> None:
        self._n = kind.n
        self._bags = Inverted(torch.cat(index.parts), None if kind.sparse else kind.n)
        self._at, self._signs = self._bags.places, None
        if index.pairs:
            self._at, self._signs = (of[self._bags.places] for of in _read_at(len(index.rows), len(index.pairs[0]), kind.dtype))

    def __call__(self, of_read: Tensor) -> Tensor:
        """The table's gradient from that of the rows, then of the differences, that were read, ``(n + k, d)``."""
        return self._bags.table(self._bags.sums(of_read, self._at, self._signs), self._n)


@lru_cache(maxsize=16)
def _read_at(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of n rows, k first and k second rows of differences: which of the n + k things that are read each belongs to, and its sign there."""
    differences = torch.arange(n, n + k)
    signs = torch.ones(n + 2 * k, dtype=dtype)
    signs[n + k :] = -1
    return torch.cat([torch.arange(n), differences, differences]), signs


class Gather:
    """Both batches of a step as one gather a table.

    Args:
        ranking: the ranking batch, B triples.
        distillation: the distillation batch, K triples, or None.

    Attributes:
        users: rows of both batches, ``(B + K,)``.
        items: rows of the ranking batch, ``(2B,)``: first items, then second ones; differences of the distillation batch.
    """

    def __init__(self, ranking: Triples, distillation: Triples | None) -> None:
        batches = [ranking] if distillation is None else [ranking, distillation]
        self._sizes = [len(batch) for batch in batches]
        self.users = Index(torch.cat([batch.users for batch in batches]))
        pairs = None if distillation is None else (distillation.first, distillation.second)
        self.items = Index(torch.cat([ranking.first, ranking.second]), pairs)
        self._own: dict[bool, tuple[Tensor, Index]] = {}

    def of_users(self, table: Tensor) -> Tensor:
        """Rows of both batches, ``(B + K, d)``."""
        return gather_rows(table, self.users)[0]

    def of_items(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the ranking batch, ``(2B, d)``, and differences of the distillation batch, ``(K, d)``."""
        return gather_rows(table, self.items)

    def ranking_rows(self, users: Tensor, items: Tensor, of_items: Index) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the ranking batch's users, first and second items, ``(B, d)`` each.

        Args:
            users, items: tables.
            of_items: where the items are in theirs.
        """
        first, second = gather_rows(items, Index(of_items.rows))[0].split(self._sizes[0])
        return gather_rows(users, Index(self.users.rows[: self._sizes[0]]))[0], first, second

    def own_items(self, *, once: bool) -> tuple[Tensor, Index]:
        """Which items a table of both batches' items alone has in its rows, and where it is read; found once a step.

        Args:
            once: each once, ascending, on a CPU alone; or as they come.
        """
        if once not in self._own:
            if once:
                rows, parts = compacted(self.items.parts)
            else:
                rows = torch.cat(self.items.parts)
                parts = list(torch.arange(len(rows), device=rows.device).split([len(part) for part in self.items.parts]))
            self._own[once] = rows, Index.of_parts(parts)
        return self._own[once]

    def read_items(self, n: int) -> Tensor:
        """The distinct items of both batches among n, ascending, on a CPU alone; found once a step."""
        return self.items.once(("read", n), lambda: distinct(torch.cat(self.items.parts), n))

    def rows(self, users: Tensor, items: Tensor, difference: Tensor | None) -> Rows:
        """What :meth:`of_users` and :meth:`of_items` gave, put together."""
        # split, not slices: its backward is one concatenation, where every slice would fill a table of zeros
        by_user, (first, second) = users.split(self._sizes), items.split(self._sizes[0])
        return Rows(by_user[0], first, second, by_user[1] if len(by_user) > 1 else None, difference)


def gather_rows(table: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
    """Rows ``(n, d)`` of a table, and differences of rows ``(k, d)`` where the index has pairs."""
    if table.device.type == "cpu":
        rows, difference = _Gather.apply(table, index)
        return rows, difference
    rows = F.embedding(index.rows, table)
    return rows, None if index.pairs is None else F.embedding(index.pairs[0], table) - F.embedding(index.pairs[1], table)


def differences(table: Tensor, apart: Tensor) -> Tensor:
    """``table[apart[0]] - table[apart[1]]`` and so on, without gradient: ``(n, d)`` of ``(2 n,)`` rows."""
    if table.device.type != "cpu":
        first, second = F.embedding(apart.view(-1, 2), table.detach()).unbind(1)
        return first - second
    # A bag of the two rows with weights 1 and -1: the same bits, and neither row is laid out.
    starts, signs = _bags_of_two(len(apart) // 2, table.dtype)
    return F.embedding_bag(apart, table.detach(), starts, mode="sum", per_sample_weights=signs)


@lru_cache(maxsize=16)
def _bags_of_two(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where each of n bags starts, and the weights of what is in them; the same in every step, and as dear to make as the bags' sums."""
    return torch.arange(0, 2 * n, 2), torch.tensor([1.0, -1.0], dtype=dtype).repeat(n)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.index, ctx.kind = index, index.kind(table)
        return F.embedding(index.rows, table), None if index.pairs is None else differences(table, index.apart)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, rows: Tensor | None, difference: Tensor | None) -> tuple[Tensor | None, None]:
        if rows is None and difference is None:
            return None, None
        index, like = ctx.index, rows if rows is not None else difference
        assert like is not None
        of_read = [like.new_zeros((len(index.rows), like.shape[1])) if rows is None else rows]
        if index.pairs is not None:
            of_read.append(like.new_zeros((len(index.pairs[0]), like.shape[1])) if difference is None else difference)
        return index.gradient(ctx.kind)(torch.cat(of_read) if len(of_read) > 1 else of_read[0]), None


def margin(users: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """s(u, first) - s(u, second) from rows ``(n, d)``, shape ``(n,)``."""
    return (users * (first - second)).sum(-1)
