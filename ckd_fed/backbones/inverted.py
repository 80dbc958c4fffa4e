"""Indices the other way round: for each row of a table, the places of an index that name it.

What is gathered by an index has a gradient that sums, row by row, over the places that name it. By the inverted index that is a sum of
bags, which torch takes with all threads and without filling a table with zeros first; scattering adds one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.kernels import check_rows, kernels


def ascending(numbers: np.ndarray) -> np.ndarray:
    """Places of whole numbers, from 0 to below 2^32, in ascending order of the numbers and of equal ones as they come.

    numpy sorts numbers of 16 bits by radix: 14,000 of them in 28 us, where its sort of int64 and torch's take 540 (one core). Larger ones
    take two passes.
    """
    places = np.argsort(numbers.astype(np.uint16), kind="stable")
    if len(numbers) and numbers.max() >= 1 << 16:
        places = places[np.argsort((numbers[places] >> 16).astype(np.uint16), kind="stable")]
    return places


class Inverted:
    """An inverted index, on the CPU.

    Args:
        index: numbers of rows, ``(k,)`` int64.
        n: rows of the table, each of which has a bag; None for bags of those alone that the index names.

    Attributes:
        places: of the index, ascending by what they name, ``(k,)``.
        bags: of each of :attr:`places`, ``(k,)``.
        starts: where in :attr:`places` the bag of each row starts, and where the last one ends, ``(number of bags + 1,)``.
        rows: numbers of the rows that have a bag, ascending; None for all n.

    Raises:
        IndexError: a row is not among the n.
    """

    def __init__(self, index: Tensor, n: int | None = None) -> None:
        numbers = index.numpy()
        self.rows: Tensor | None = None
        compiled = kernels()
        if n is not None and compiled is not None:
            self.places, self.bags, self.starts = compiled.inverted(index.contiguous(), n)
            return
        if n is not None:
            check_rows(index, n)
        places = ascending(numbers)
        bags = ordered = numbers[places]
        if n is None:
            starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])) if len(ordered) else np.zeros(1, dtype=np.int64)
            self.rows = torch.from_numpy(ordered[starts[:-1]])
            bags = np.repeat(np.arange(len(self.rows)), np.diff(starts))
        else:
            starts = np.zeros(n + 1, dtype=np.int64)
            np.cumsum(np.bincount(numbers, minlength=n), out=starts[1:])
        self.places, self.bags, self.starts = torch.from_numpy(places), torch.from_numpy(bags), torch.from_numpy(starts)

    def table(self, sums: Tensor, n: int) -> Tensor:
        """A table of n rows, ``(n, d)``, from a row for each bag; sparse where bags are of some rows alone."""
        if self.rows is None:
            return sums
        return torch.sparse_coo_tensor(self.rows[None], sums, (n, *sums.shape[1:]), is_coalesced=True, check_invariants=False)

    def sums(self, source: Tensor, at: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        """Of each bag, the sum over its places of a row of the source, times a factor, in the order of the index.

        Args:
            source: ``(m, d)``, without gradient.
            at: the source's row at each of :attr:`places`, ``(k,)``; by default the place itself.
            factors: at each of :attr:`places`, ``(k,)``, or none.

        Returns:
            ``(number of bags, d)``; 0 where a bag is empty.
        """
        return F.embedding_bag(
            self.places if at is None else at, source, self.starts, mode="sum", per_sample_weights=factors, include_last_offset=True
        )


def distinct(index: Tensor, n: int | None = None) -> Tensor:
    """The distinct numbers of an index on the CPU, ascending: ``unique``, in a fraction of its time.

    Args:
        index: ``(k,)`` int64.
        n: what all are below, where a pass over n flags is little beside the index: a compiled kernel then takes it.

    Raises:
        IndexError: a number is not below n.
    """
    compiled = kernels()
    if n is not None and compiled is not None:
        return compiled.distinct(index, n)
    rows = Inverted(index).rows
    assert rows is not None
    return rows


def compacted(indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The distinct numbers of some index tensors on the CPU in ascending order, and the indices, of any shapes, as positions among these."""
    flat = torch.cat([index.reshape(-1) for index in indices])
    inverted = Inverted(flat)
    assert inverted.rows is not None
    positions = torch.empty_like(flat)
    positions[inverted.places] = inverted.bags
    parts = positions.split([index.numel() for index in indices])
    return inverted.rows, [part.view(index.shape) for part, index in zip(parts, indices, strict=True)]
