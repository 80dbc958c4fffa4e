"""Nearest neighbours, their gradient and normalisation, against dense matrices."""

import numpy as np
import pytest
import torch
from dense_graphs import nearest as nearest_of_those

from ckd_fed.backbones import item_graph
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.item_graph import Neighbours, frozen_nearest, nearest, normalise, union
from ckd_fed.errors import ConfigError

N = 23


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(graph):
    return graph @ torch.eye(len(graph.index), dtype=torch.float64)


def nearest_by_hand(x, k):
    """The published way: the whole similarity matrix, its k largest a row."""
    unit = x / x.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    top = torch.topk(similarity, k)
    return torch.zeros_like(similarity).scatter(1, top.indices, top.values)


def sym_by_hand(s):
    root = s.sum(1).pow(-0.5)
    return root[:, None] * s * root


@pytest.mark.parametrize(("block", "rows"), [(1, 1), (5 * N, 1), (10**6, 1), (10**6, 256), (7 * 4, 7), (20, 256)])
@pytest.mark.parametrize("k", [1, 4, N])
def test_nearest_is_the_published_one_whatever_the_blocks(monkeypatch, block, rows, k):
    monkeypatch.setattr(item_graph, "_BLOCK", block)
    monkeypatch.setattr(item_graph, "_ROWS", rows)
    x = draw(N, 5)
    graph = nearest(x, k)
    assert graph.index.shape == graph.weight.shape == (N, k)
    assert (graph.index == torch.arange(N).unsqueeze(1)).any(1).all()
    torch.testing.assert_close(dense(graph), nearest_by_hand(x, k), rtol=1e-12, atol=1e-14)


def test_more_neighbours_than_items():
    assert nearest(draw(3, 2), 10).index.shape == (3, 3)


def test_gradient_is_that_of_the_dense_graph():
    x, z = draw(N, 5).requires_grad_(), draw(N, 3, seed=1).requires_grad_()
    signal = draw(N, 3, seed=2)
    expected = torch.autograd.grad((sym_by_hand(nearest_by_hand(x, 4)) @ z * signal).sum(), (x, z))
    found = torch.autograd.grad(((normalise(nearest(x, 4)) @ z) * signal).sum(), (x, z))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["sym", "rw"])
def test_normalisation(kind):
    graph = nearest(draw(N, 5), 4)
    s = dense(graph)
    expected = sym_by_hand(s) if kind == "sym" else s / s.sum(1, keepdim=True)
    torch.testing.assert_close(dense(normalise(graph, kind)), expected, rtol=1e-12, atol=1e-14)


def test_unknown_normalisation(refuses):
    refuses(ConfigError, lambda: normalise(nearest(draw(3, 2), 2), "row"), "'row'", "rw", "sym")


def test_a_union_adds_and_a_constant_graph_is_the_same(monkeypatch):
    one, two = nearest(draw(N, 5), 4), nearest(draw(N, 5, seed=1), 3)
    both = union([one.scaled(0.3), two])
    torch.testing.assert_close(dense(both), 0.3 * dense(one) + dense(two), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(both.to_scipy().toarray(), dense(both).numpy(), rtol=1e-13)
    x, signal = draw(N, 3, seed=2).requires_grad_(), draw(N, 3, seed=3)
    expected, y = torch.autograd.grad((both @ x * signal).sum(), x)[0], both @ x
    constant = both.constant()
    monkeypatch.setattr(torch, "argsort", None)  # prepared once: no sorting in a product
    found = constant @ x
    assert torch.equal(found, y)
    torch.testing.assert_close(torch.autograd.grad((found * signal).sum(), x)[0], expected, rtol=1e-13, atol=1e-15)


def test_a_constant_graph_with_items_that_nobody_has_as_neighbour():
    graph = Neighbours(torch.tensor([[1, 1], [1, 0], [1, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]], dtype=torch.float64))
    x = draw(3, 2).requires_grad_()
    (graph.constant() @ x).sum().backward()
    torch.testing.assert_close(x.grad, dense(graph).T @ torch.ones(3, 2, dtype=torch.float64))


def test_a_row_of_zeros_poisons_nothing():
    x = draw(N, 5)
    x[7] = 0
    x.requires_grad_()
    graph = nearest(x, 4)
    alone = torch.zeros(N, dtype=torch.float64)
    alone[7] = 1
    assert torch.equal(dense(graph)[7], alone)
    torch.testing.assert_close(dense(normalise(graph))[7], alone)
    others = [i for i in range(N) if i != 7]
    rest = x.detach()[others]
    torch.testing.assert_close(dense(graph)[others][:, others], nearest_by_hand(rest, 4), rtol=1e-12, atol=1e-14)
    (normalise(graph) @ draw(N, 2, seed=1)).square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[7].any()
    assert dense(nearest(torch.zeros(3, 2, dtype=torch.float64), 2)).equal(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sym", "rw"])
def test_a_row_sum_that_is_not_positive_takes_no_part(kind):
    index = torch.tensor([[0, 1], [1, 2], [2, 0]])
    weight = torch.tensor([[1.0, -1.5], [1.0, -1.0], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    graph = normalise(Neighbours(index, weight), kind)
    assert graph.weight[:2].eq(0).all()
    torch.testing.assert_close(graph.weight[2, 0].item(), 1 / 1.5)
    graph.weight.sum().backward()
    assert weight.grad.isfinite().all()


def test_a_frozen_graph_is_made_once_for_the_same_features_and_k(monkeypatch):
    item_graph._frozen.clear()
    x = draw(N, 5)
    one = frozen_nearest(x, 4)
    assert frozen_nearest(x.clone(), 4) is one
    assert frozen_nearest(x, 3) is not one
    assert frozen_nearest(x.float(), 4) is not one
    changed = x.clone()
    changed[0, 0] += 1
    assert frozen_nearest(changed, 4) is not one
    monkeypatch.setattr(item_graph, "_KEPT", 2)
    frozen_nearest(draw(N, 5, seed=9), 4)
    for seed in range(3):
        frozen_nearest(draw(N, 5, seed=seed), 2)
    assert frozen_nearest(x, 4) is not one


@pytest.mark.parametrize("k", [4, N])
def test_items_that_are_not_there_are_nobodys_neighbours(k):
    x, present = draw(N, 5), torch.arange(N) % 4 != 2
    graph = nearest(x, k, present)
    torch.testing.assert_close(dense(graph), nearest_of_those(x, k, present), rtol=1e-12, atol=1e-14)
    assert not dense(graph)[:, ~present].any()
    assert not dense(graph)[~present].any()
    assert frozen_nearest(x, k, present) is frozen_nearest(x, k, present.clone())
    assert frozen_nearest(x, k, present) is not frozen_nearest(x, k)
    assert dense(frozen_nearest(x, k, present)).equal(dense(graph))


@pytest.mark.parametrize(("name", "layers"), [("freedom", 1), ("micro", 1), ("micro", 2), ("mgcn", 1), ("mgcn", 2)])
def test_an_item_that_lacks_a_modality_is_as_in_the_view_without_it(name, layers, random_interactions, random_features):
    """Also once features have drifted; of the others each differs."""
    present = np.arange(N) % 3 != 1
    options = {"embedding_dim": 4, "neighbours": 3, "n_item_layers": layers}
    model = build_backbone(name, random_interactions(9, N), random_features(N, 3), options, seed=0, masks={"text": present}, dtype=torch.float64)
    with torch.no_grad():
        for drift in model.drift.values():
            drift.copy_(draw(*drift.shape))
    tables = model.eval().embed([model.joint, model.without("text")])
    joint, without = (tables[view].items for view in (model.joint, model.without("text")))
    torch.testing.assert_close(joint[~present], without[~present], rtol=1e-12, atol=1e-14)
    assert ((joint - without).abs().amax(1) > 1e-6)[present].all()
