"""Sparse propagation over a fixed graph, with a backward that is as fast as the forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from ckd_fed.data.interactions import Interactions


class Propagation(nn.Module):
    """Multiplication by a constant sparse matrix A, ``(n, m) @ (m, d)``.

    A and its transpose are kept in compressed-row form, so the gradient ``A.T @ g`` runs at the forward's speed. On the CPU the
    segment-reduce kernel (the one torch-geometric's ``EdgeIndex.matmul`` uses in its forward) replaces the general sparse product.

    Args:
        matrix: the constant A.
        dtype: of the values.
    """

    def __init__(self, matrix: sp.csr_array | sp.csr_matrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # Six plain buffers: a module's .to(device) moves them, which it does not do reliably for sparse tensors.
        self.shape = matrix.shape
        for name, csr in (("forward", matrix.tocsr(copy=True)), ("transposed", matrix.T.tocsr(copy=True))):
            csr.sort_indices()
            self.register_buffer(f"{name}_indptr", torch.from_numpy(csr.indptr.astype(np.int64)), persistent=False)
            self.register_buffer(f"{name}_indices", torch.from_numpy(csr.indices.astype(np.int64)), persistent=False)
            self.register_buffer(f"{name}_values", torch.from_numpy(csr.data).to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """A @ x, shape ``(n, d)``."""
        return _Product.apply(x, self._matrix("forward", self.shape), self._matrix("transposed", self.shape[::-1]))

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        indptr, indices, values = (self.get_buffer(f"{name}_{part}") for part in ("indptr", "indices", "values"))
        return torch.sparse_csr_tensor(indptr, indices, values, size=shape, check_invariants=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _multiply(matrix, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(ctx.transposed, gradients[0]), None, None


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return torch.sparse.mm(matrix, x.contiguous(), "sum")  # type: ignore[call-overload]
    return matrix @ x


def row_normalised_adjacency(train: Interactions) -> sp.csr_array:
    """D^-1 (A + I) of the bipartite graph, users first, ``(n_users + n_items)`` squared, float64."""
    n_users, n = train.n_users, train.n_users + train.n_items
    ones = np.ones(len(train))
    upper = sp.csr_array((ones, (train.row, train.items + n_users)), shape=(n, n))
    matrix = upper + upper.T + sp.eye_array(n)
    return (sp.diags_array(1.0 / np.asarray(matrix.sum(axis=1)).ravel()) @ matrix).tocsr()


def symmetric_normalised_adjacency(train: Interactions, epsilon: float = 0.0) -> sp.csr_array:
    """D^-1/2 A D^-1/2 of the bipartite graph without self loops, users first, ``(n_users + n_items)`` squared, float64.

    Args:
        train: the interactions.
        epsilon: added to every degree, as some published models do; rows of nodes without edges are zero either way.
    """
    n_users, n = train.n_users, train.n_users + train.n_items
    ones = np.ones(len(train))
    upper = sp.csr_array((ones, (train.row, train.items + n_users)), shape=(n, n))
    matrix = (upper + upper.T).tocsr()
    degree = np.asarray(matrix.sum(axis=1)).ravel()
    scale = np.where(degree > 0, degree + epsilon, 1.0) ** -0.5
    return (sp.diags_array(scale) @ matrix @ sp.diags_array(scale)).tocsr()
