"""What only BM3 promises: scores without features, a loss without negatives, dropout of the targets, drift instead of features."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Backbone, Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.errors import ConfigError

N_USERS, N_ITEMS = 8, 12


@pytest.fixture
def train(random_interactions):
    return random_interactions(N_USERS, N_ITEMS, low=0, high=4)


@pytest.fixture
def build(train, random_features):
    def make(n_modalities=2, masks=None, **options):
        features = random_features(N_ITEMS, n_modalities)
        return build_backbone("bm3", train, features, {"embedding_dim": 4, **options}, seed=0, masks=masks, dtype=torch.float64)

    return make


@pytest.fixture
def triples():
    return Triples(torch.tensor([0, 3, 3, 7]), torch.tensor([1, 2, 1, 0]), torch.tensor([5, 6, 0, 3]))


def unlike(one, two):
    return 1 - ((one * two).sum(1) / one.norm(dim=1) / two.norm(dim=1)).mean()


@pytest.mark.parametrize("masks", [None, {"image": np.arange(N_ITEMS) != 1}], ids=["complete", "lacking"])
@pytest.mark.parametrize("n_modalities", [1, 3])
def test_loss_by_hand(build, train, random_features, triples, n_modalities, masks):
    model = build(n_modalities, masks=masks, dropout=0.0, n_layers=2, l2=0.1)
    with torch.no_grad():
        model.drift["image"].normal_()
    state = model.state_dict()
    adjacency = np.zeros((N_USERS + N_ITEMS,) * 2)
    adjacency[train.row, train.items + N_USERS] = 1
    adjacency += adjacency.T
    scale = np.divide(1, np.sqrt(adjacency.sum(1) + 1e-7), where=adjacency.sum(1) > 0, out=np.zeros(len(adjacency)))
    adjacency = torch.from_numpy(scale[:, None] * adjacency * scale)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    ids = torch.cat([state["user_embedding"], state["item_embedding"]])
    h = (ids + adjacency @ ids + adjacency @ adjacency @ ids) / 3
    users, items = h[:N_USERS], h[N_USERS:] + state["item_embedding"]
    u, i = triples.users, triples.first
    terms = model.step(triples).loss_terms
    expected = unlike(linear("predictor", users)[u], items[i]) + unlike(linear("predictor", items)[i], users[u])
    torch.testing.assert_close(terms["reconstruction"], expected)
    expected = 0
    for m, matrix in random_features(N_ITEMS, n_modalities).items():
        having = i if masks is None or m not in masks else i[i != 1]
        f = linear(f"projection.{m}", torch.from_numpy(matrix) + state[f"drift.{m}"])[having]
        expected += 2 * (unlike(linear("predictor", f), items[having]) + unlike(linear("predictor", f), f))
    torch.testing.assert_close(terms["alignment"], expected)
    torch.testing.assert_close(terms["l2"], 0.1 * (users.norm() + items.norm()) / N_ITEMS)
    for table, ours in zip((users, items), model.embed([model.joint])[model.joint], strict=True):
        torch.testing.assert_close(ours, linear("predictor", table))


def test_negatives_do_not_matter(build, triples):
    model = build(dropout=0.0)
    other = Triples(triples.users, triples.first, torch.tensor([9, 9, 9, 9]))
    assert model.step(triples).loss_terms == model.step(other).loss_terms


def test_views_are_one_and_the_same(build, triples):
    model = build()
    views = [model.joint, model.only("image"), frozenset()]
    assert len({id(tables) for tables in model.embed(views).values()}) == 1
    output = model.step(triples, views, triples, views[1:])
    assert all(torch.equal(output.ranking[view], output.ranking[model.joint]) for view in views)
    assert set(output.distillation) == set(views[1:])


def test_a_step_is_that_of_whole_tables_and_predicts_the_rows_of_its_batches_alone(build, triples):
    model, few = build(dropout=0.0), Triples(torch.tensor([2, 2]), torch.tensor([3, 0]), torch.tensor([3, 4]))
    views, predicted = [model.joint, model.only("image")], []
    model.predictor.register_forward_hook(lambda _module, entering, _output: predicted.append(len(entering[0])))

    def numbers(step):
        model.zero_grad()
        output = step(triples, views, few, views)
        margins = [output.ranking[model.joint], output.distillation[model.joint]]
        (sum(output.loss_terms.values()) + sum(margin.tanh().sum() for margin in margins)).backward()
        return {**output.loss_terms, **dict(enumerate(margins)), **{key: parameter.grad for key, parameter in model.named_parameters()}}

    ours, rows, theirs = numbers(model.step), predicted[:2], numbers(partial(Backbone.step, model))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-13, msg=key)
    assert rows == [4 + 2, 2 * 4]  # users of both batches, items of the ranking batch


def test_targets_pass_no_gradient(build, triples):
    """An item's features learn to predict; the item does not learn to be predicted."""
    model = build(dropout=0.0)
    model.step(triples).loss_terms["alignment"].backward()
    assert model.user_embedding.grad is None
    assert model.item_embedding.grad is None
    assert model.drift["image"].grad.abs().sum() > 0


def test_dropout_keeps_its_share_and_scales_it(build):
    model = build(dropout=0.3)
    model.start_epoch(0, torch.Generator().manual_seed(0))
    rows = torch.ones(4000, 4, dtype=torch.float64)
    dropped = model._target("item", torch.arange(4000), rows, 4000)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs(dropped.mean() - 1) < 0.02


def test_an_item_has_one_mask_a_step(build):
    model = build(dropout=0.5)
    index = torch.tensor([3, 1, 3, 0, 3, 1])
    keep = model._keep("item", index, torch.ones(6, 64), N_ITEMS)
    assert torch.equal(keep[0], keep[2])
    assert torch.equal(keep[0], keep[4])
    assert torch.equal(keep[1], keep[5])
    assert not torch.equal(keep[0], keep[1])


def test_dropout_follows_the_epochs_generator(build, triples):
    model = build(dropout=0.5)

    def epoch(seed):
        model.start_epoch(0, torch.Generator().manual_seed(seed))
        return [sum(model.step(triples).loss_terms.values()).item() for _ in range(2)]

    first = epoch(1)
    assert first[0] != first[1]
    assert epoch(2) != first
    assert epoch(1) == first


def test_drift_trains_as_the_published_table_does(build, triples):
    """Adam on features + drift, and on one table that starts as the features: the same sums."""
    model = build(dropout=0.0)
    other = copy.deepcopy(model)
    with torch.no_grad():  # the whole table a Parameter, nothing constant
        for m in other.modalities:
            other.drift[m].copy_(other.get_buffer(f"features_{m}"))
            other.get_buffer(f"features_{m}").zero_()
    for one in (model, other):
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            sum(one.step(triples).loss_terms.values()).backward()
            optimizer.step()
    for m in model.modalities:
        moved = model.get_buffer(f"features_{m}") + model.drift[m]
        torch.testing.assert_close(moved, other.drift[m].detach(), rtol=1e-9, atol=1e-11)
        assert model.drift[m].abs().max() > 0


def test_no_feature_is_saved(build):
    model = build()
    assert not any(value.shape == model.get_buffer("features_image").shape and value.abs().sum() for value in model.state_dict().values())


def test_dropout_of_everything_is_refused(build, refuses):
    refuses(ConfigError, lambda: build(dropout=1.0), "model.dropout", "1.0")
