"""Attention over the edges of the bipartite graph, against a dense matrix with minus infinity where there is no edge."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ckd_fed.backbones.attention import BipartiteEdges, unit_rows


@pytest.fixture
def train(interactions):
    return interactions([[0, 2, 3], [], [3], [0, 1, 2, 3, 5], [2, 5]], 6)  # user 1 and item 4 have no edges


@pytest.fixture
def edges(train):
    return BipartiteEdges(train, torch.float64)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (5, 6))


@pytest.fixture
def dense(train):
    """0 at the edges, minus infinity elsewhere."""
    mask = torch.full((5, 6), -torch.inf, dtype=torch.float64)
    mask[train.row, train.items] = 0
    return mask


def test_attention_is_the_dense_one(edges, rows, dense):
    users, items = rows
    logits = users @ items.T + dense
    expected = torch.softmax(logits, 1).nan_to_num(0) @ items, torch.softmax(logits, 0).nan_to_num(0).T @ users
    for ours, theirs in zip(edges.attend(users, items), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_weights_are_in_the_order_of_users(edges, rows, train):
    users, items = (x.detach() for x in rows)
    weights = torch.arange(1.0, len(train) + 1, dtype=torch.float64)
    matrix = torch.zeros(5, 6, dtype=torch.float64)
    matrix[train.row, train.items] = weights
    torch.testing.assert_close(edges.to_users(weights, items), matrix @ items)
    torch.testing.assert_close(edges.to_items(weights, users), matrix.T @ users)
    torch.testing.assert_close(edges.similarity(users, items), (users @ items.T)[train.row, train.items])


@pytest.mark.parametrize("operation", ["similarity", "to_users", "to_items", "softmax_at_users", "softmax_at_items", "attend"])
def test_gradcheck(edges, rows, operation):
    users, items = rows
    weights = torch.rand(edges.n_edges, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = {
        "similarity": (users, items),
        "attend": (users, items),
        "to_users": (weights, items),
        "to_items": (weights, users),
    }.get(operation, (weights,))
    assert torch.autograd.gradcheck(getattr(edges, operation), inputs)


def test_rows_need_not_be_contiguous(edges, rows):
    users, items = (x.detach() for x in rows)
    for ours, theirs in zip(edges.attend(users.T.contiguous().T, items.T.contiguous().T), edges.attend(users, items), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_edges_are_no_part_of_the_state(edges):
    assert not edges.state_dict()
    assert edges.to(torch.float32).zeros.dtype == torch.float32


def test_unit_rows_are_those_of_normalize():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[1], x[2] = 0, 1e-14
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.arange(15.0, dtype=torch.float64).view(5, 3)
    ours, theirs = unit_rows(one), F.normalize(two)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=0)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-14)
