"""What only FREEDOM promises: pruned edges, frozen binary graphs, mixing weights, modality losses."""

import numpy as np
import pytest
import torch
from dense_graphs import nearest, spread

from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.freedom import EPSILON, Edges, kept_edges, mixing_weights
from ckd_fed.backbones.graph import symmetric_normalised_adjacency
from ckd_fed.errors import ConfigError

N_USERS, N_ITEMS = 9, 14
# Items that lack a modality, which no published code knows; the other modalities are complete.
LACKING = {"text": np.arange(N_ITEMS) % 3 != 1}


@pytest.fixture
def train(random_interactions):
    return random_interactions(N_USERS, N_ITEMS, low=0)


@pytest.fixture
def build(train, random_features):
    def make(n_modalities=2, features=None, masks=None, **options):
        features = random_features(N_ITEMS, n_modalities) if features is None else features
        options = {"embedding_dim": 4, "neighbours": 3, **options}
        return build_backbone("freedom", train, features, options, seed=0, masks=masks, dtype=torch.float64)

    return make


def item_graph_by_hand(features, k, has):
    """Binary kNN, normalised, as a dense matrix."""
    chosen = nearest(torch.from_numpy(features), k, has) != 0
    return spread(chosen.double() / (k + EPSILON), 1 / N_ITEMS, has)


def by_hand(model, train, features, present, weights):
    """Both tables of a view in dense products, on the full user-item graph."""
    adjacency = torch.from_numpy(symmetric_normalised_adjacency(train, EPSILON).toarray())
    ids = torch.cat([model.user_embedding, model.item_embedding])
    mean = (ids + adjacency @ ids + adjacency @ adjacency @ ids) / 3
    uniform = torch.full((N_ITEMS, N_ITEMS), 1 / N_ITEMS, dtype=torch.float64)
    h = sum(weights[m] * (item_graph_by_hand(x, 3, model.present(m)) if m in present else uniform) for m, x in features.items())
    return mean[:N_USERS], mean[N_USERS:] + h @ (h @ model.item_embedding)


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
@pytest.mark.parametrize("present", [(), ("text",), ("image", "audio"), ("image", "text", "audio")])
def test_tables_of_any_view(build, train, random_features, present, masks):
    model = build(3, masks=masks, n_item_layers=2, image_weight=0.4).eval()
    found = model.embed([model.joint, frozenset(present), model.only("image")])[frozenset(present)]
    expected = by_hand(model, train, random_features(N_ITEMS, 3), present, {"image": 0.4, "text": 0.3, "audio": 0.3})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_mixing_weights():
    assert mixing_weights(["image", "text"], 0.1) == pytest.approx({"image": 0.1, "text": 0.9})
    assert mixing_weights(["audio", "image", "text"], 0.1) == pytest.approx({"image": 0.1, "audio": 0.45, "text": 0.45})
    assert mixing_weights(["title", "text"], 0.1) == pytest.approx({"title": 0.1, "text": 0.9})
    assert mixing_weights(["text"], 0.1) == {"text": 1.0}


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
def test_losses_are_those_written_out(build, masks):
    """A modality's own over the triples of which both items have it."""
    model = build(masks=masks, modality_weight=0.2, l2=0.0)
    rng = np.random.default_rng(0)
    triples = Triples(*(torch.from_numpy(rng.integers(bound, size=40)) for bound in (N_USERS, N_ITEMS, N_ITEMS)))
    few = Triples(*(index[:5] for index in triples))
    with torch.no_grad():
        for drift in model.drift.values():
            drift.normal_(generator=torch.Generator().manual_seed(0))
    for batch in (triples, few):
        terms = model.step(batch).loss_terms
        users = model.embed([model.joint])[model.joint].users[batch.users]
        assert set(terms) == {"bpr", "bpr_image", "bpr_text"}
        for m in model.modalities:
            f = model.projection[m](model.features(m) + model.drift[m])
            gap = (users * f[batch.first]).sum(1) - (users * f[batch.second]).sum(1)
            has = torch.ones(N_ITEMS, dtype=torch.bool) if model.present(m) is None else model.present(m)
            gap = gap[has[batch.first] & has[batch.second]]
            torch.testing.assert_close(terms[f"bpr_{m}"], 0.2 * -gap.sigmoid().log().mean())
    assert set(build(1).step(few).loss_terms) == {"bpr", "bpr_image"}
    assert "l2" in build(1, l2=0.1).step(few).loss_terms


def test_pruned_adjacency_is_that_of_the_kept_edges(train, interactions):
    edges = Edges(train)
    keep = torch.from_numpy(np.random.default_rng(1).random(len(train)) < 0.5)
    rows = [[] for _ in range(N_USERS)]
    for user, item in zip(train.row[keep], train.items[keep], strict=True):
        rows[user].append(item)
    expected = symmetric_normalised_adjacency(interactions(rows, N_ITEMS), EPSILON).toarray()
    np.testing.assert_allclose(edges.adjacency(keep, torch.float64).sparse().to_dense().numpy(), expected, rtol=1e-14)
    assert not edges.adjacency(torch.zeros(len(train), dtype=torch.bool), torch.float64).sparse().to_dense().any()


@pytest.mark.parametrize("dropout", [0.0, 0.4, 0.8, 1.0])
def test_how_many_edges_are_kept(train, dropout):
    keep = Edges(train).draw(dropout, torch.Generator().manual_seed(0))
    assert keep.sum() == kept_edges(len(train), dropout) == int(len(train) * (1 - dropout))


def test_edges_are_drawn_by_their_degrees(interactions):
    """One edge of three, with probabilities proportional to 1 / sqrt(d_u d_i): 1/2, 1/2 and 1."""
    edges = Edges(interactions([[0, 1], [2], [2, 3, 4, 5]], 6))
    expected = edges.importance / edges.importance.sum()
    np.testing.assert_allclose(edges.importance, [2**-0.5, 2**-0.5, 2**-0.5, 8**-0.5, 0.5, 0.5, 0.5], rtol=1e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([edges.draw(6 / 7 - 1e-9, generator) for _ in range(4000)]).double().mean(0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=4 * (0.25 / 4000) ** 0.5)


def test_an_epoch_has_its_own_edges_and_evaluation_has_all(build):
    model = build(edge_dropout=0.5)

    def users(seed=None):
        if seed is not None:
            model.start_epoch(0, torch.Generator().manual_seed(seed))
        return model.embed([model.joint])[model.joint].users.detach()

    one, two = users(1), users(2)
    assert not torch.equal(one, two)
    assert torch.equal(users(1), one)
    full = build(edge_dropout=0.0)
    full.start_epoch(0, torch.Generator())
    assert torch.equal(full.embed([full.joint])[full.joint].users, model.eval().embed([model.joint])[model.joint].users)


def test_an_item_without_features_keeps_itself(build, random_features):
    features = random_features(N_ITEMS)
    features["image"][3] = 0
    model = build(features=features, edge_dropout=0.0)
    graph = model.item_graph["image"](torch.eye(N_ITEMS, dtype=torch.float64))
    expected = torch.zeros(N_ITEMS, dtype=torch.float64)
    expected[3] = 1
    torch.testing.assert_close(graph[3], expected, rtol=1e-6, atol=0)
    assert all(table.isfinite().all() for table in model.embed([model.joint])[model.joint])


def test_impossible_options(build, refuses):
    refuses(ConfigError, lambda: build(edge_dropout=1.5), "edge_dropout", 1.5)
    refuses(ConfigError, lambda: build(image_weight=2.0), "image_weight", 2.0)
