"""Sparse propagation over a fixed graph, with a backward that is as fast as the forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.data.interactions import Interactions


class Csr(NamedTuple):
    """A sparse matrix in compressed-row form: the columns of row r are ``indices[indptr[r]:indptr[r + 1]]``, likewise its values."""

    indptr: Tensor
    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def sparse(self) -> Tensor:
        """As a sparse tensor of torch."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # nothing that a user can act on
            return torch.sparse_csr_tensor(self.indptr, self.indices, self.values, size=self.shape, check_invariants=False)


class Propagation(nn.Module):
    """Multiplication by a constant sparse matrix A, ``(n, m) @ (m, d)``.

    A and its transpose are kept in compressed-row form, so the gradient ``A.T @ g`` runs at the forward's speed. On the CPU the
    embedding-bag kernel takes the place of the sparse product: the same bits in float32, three to five times as fast as the
    segment-reduce kernel that torch-geometric's ``EdgeIndex.matmul`` uses.

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

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Csr:
        indptr, indices, values = (self.get_buffer(f"{name}_{part}") for part in ("indptr", "indices", "values"))
        return Csr(indptr, indices, values, shape)


def constant_product(x: Tensor, matrix: Csr, transposed: Csr) -> Tensor:
    """``matrix @ x`` for a constant matrix; the gradient multiplies by its transpose."""
    return _Product.apply(x, matrix, transposed)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Csr, transposed: Csr) -> Tensor:
        ctx.transposed = transposed
        return multiply(matrix, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return multiply(ctx.transposed, gradients[0]), None, None


def multiply(matrix: Csr, x: Tensor) -> Tensor:
    """matrix @ x without gradient, by the fastest kernel of the device."""
    if x.device.type == "cpu":
        # A row of A @ x is a weighted bag of rows of x; that kernel is vectorised, the sparse product's is not.
        x = x.detach().contiguous()  # detached, for otherwise the kernel prepares a backward of its own
        return F.embedding_bag(matrix.indices, x, matrix.indptr, mode="sum", per_sample_weights=matrix.values, include_last_offset=True)
    return matrix.sparse() @ x


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


def light_gcn(propagate: Callable[[Tensor], Tensor], x: Tensor, layers: int) -> Tensor:
    """LightGCN's readout, mean(E_0, ..., E_L) with E_0 = x and E_l+1 = A E_l (He et al. 2020, arXiv:2002.02126)."""
    total = x
    for _ in range(layers):
        x = propagate(x)
        total = total + x
    return total / (layers + 1)
