"""Sparse propagation and its backward."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch_geometric import EdgeIndex

from ckd_fed.backbones.graph import Propagation, row_normalised_adjacency
from ckd_fed.data.interactions import Interactions

REFERENCE = Path(__file__).parents[1] / "reference" / "mmgcn.npz"


@pytest.fixture(params=[(9, 9), (7, 12), (12, 7)], ids=str)
def matrix(request):
    """Random, with an empty row and an empty column."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=request.param) * (rng.random(request.param) < 0.3)
    dense[2], dense[:, 4] = 0, 0
    return sp.csr_array(dense)


def test_forward_and_backward_equal_scipy(matrix):
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(matrix.shape[1], 5))).requires_grad_()
    g = rng.normal(size=(matrix.shape[0], 5))
    y = Propagation(matrix, torch.float64)(x)
    y.backward(torch.from_numpy(g))
    np.testing.assert_allclose(y.detach().numpy(), matrix @ x.detach().numpy(), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(x.grad.numpy(), matrix.T @ g, rtol=1e-13, atol=1e-15)


def test_gradcheck(matrix):
    x = torch.randn(matrix.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(Propagation(matrix, torch.float64), (x,))


def test_equals_torch_geometric(matrix):
    coo = matrix.tocoo()
    index = EdgeIndex(np.stack([coo.row, coo.col]).tolist(), sparse_size=matrix.shape, sort_order="row")
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(matrix.shape[1], 4)))
    expected = index.matmul(x, input_value=torch.from_numpy(coo.data.copy()))
    torch.testing.assert_close(Propagation(matrix, torch.float64)(x), expected, rtol=1e-12, atol=1e-14)


def test_inputs_need_not_be_contiguous(matrix):
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(4, matrix.shape[1]))).T
    assert not x.is_contiguous()
    np.testing.assert_allclose(Propagation(matrix, torch.float64)(x).numpy(), matrix @ x.numpy(), rtol=1e-13, atol=1e-15)


def test_the_matrix_is_no_part_of_the_state(matrix):
    module = Propagation(matrix)
    assert not module.state_dict()
    assert {"forward_values", "transposed_values"} <= set(dict(module.named_buffers()))
    assert module(torch.ones(matrix.shape[1], 2)).dtype == torch.float32


def test_adjacency_is_the_published_one():
    with np.load(REFERENCE) as reference:
        rows, columns = np.nonzero(reference["input.interactions"])
        train = Interactions.from_pairs(rows, columns, *reference["input.interactions"].shape)
        expected = reference["input.adj_row_normalised_with_self_loops"]
    np.testing.assert_allclose(row_normalised_adjacency(train).toarray(), expected, rtol=1e-15)


def test_adjacency_of_isolated_nodes(interactions):
    dense = row_normalised_adjacency(interactions([[0], []], 2)).toarray()
    np.testing.assert_array_equal(dense, [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
