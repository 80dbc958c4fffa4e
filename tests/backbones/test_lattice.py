"""What only LATTICE promises: the mixed graph of any view, kept for an epoch."""

import numpy as np
import pytest
import torch
from dense_graphs import nearest, spread, sym
from torch.nn.functional import leaky_relu, normalize

from ckd_fed.backbones import lattice
from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.graph import row_normalised_adjacency
from ckd_fed.errors import ConfigError

N_USERS, N_ITEMS, K = 9, 15, 4
# Items that lack a modality, which no published code knows; the other modalities are complete.
LACKING = {"text": np.arange(N_ITEMS) % 3 != 1}


@pytest.fixture
def train(random_interactions):
    return random_interactions(N_USERS, N_ITEMS, low=0)


@pytest.fixture
def build(train, random_features):
    def make(n_modalities=3, features=None, masks=None, **options):
        features = random_features(N_ITEMS, n_modalities) if features is None else features
        options = {"embedding_dim": 4, "neighbours": K, **options}
        model = build_backbone("lattice", train, features, options, seed=0, masks=masks, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (*model.drift.values(), model.modal_weight):
                parameter.normal_(std=0.7, generator=generator)
        return model

    return make


def graph_by_hand(model, present):
    """S of a view as a dense matrix."""
    a = model.modal_weight.softmax(0)
    learned, frozen = 0, 0
    for share, m in zip(a, model.modalities, strict=True):
        features, has = model.features(m), model.present(m)
        if m in present:
            learned = learned + share * spread(nearest(model.projection[m](features + model.drift[m]), K, has), K / N_ITEMS, has)
            frozen = frozen + share * spread(sym(nearest(features, K, has)), 1 / N_ITEMS, has)
        else:
            learned = learned + share * torch.full((N_ITEMS, N_ITEMS), K / N_ITEMS, dtype=torch.float64)
            frozen = frozen + share * torch.full((N_ITEMS, N_ITEMS), 1 / N_ITEMS, dtype=torch.float64)
    return (1 - model.frozen_share) * sym(learned) + model.frozen_share * frozen


def tables_by_hand(model, train, present):
    adjacency = torch.from_numpy(row_normalised_adjacency(train).toarray())
    ids = torch.cat([model.user_embedding, model.item_embedding])
    mean = (ids + adjacency @ ids + adjacency @ adjacency @ ids) / 3
    h = graph_by_hand(model, present)
    return mean[:N_USERS], mean[N_USERS:] + normalize(h @ h @ model.item_embedding)


def triples(n=12):
    generator = torch.Generator().manual_seed(2)
    return Triples(*(torch.randint(bound, (n,), generator=generator) for bound in (N_USERS, N_ITEMS, N_ITEMS)))


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
@pytest.mark.parametrize("present", [(), ("text",), ("image", "audio"), ("image", "text", "audio")], ids=str)
def test_tables_and_gradients_of_any_view(build, train, present, masks):
    model, view = build(masks=masks, n_item_layers=2, frozen_share=0.6), frozenset(present)

    def gradients(tables):
        model.zero_grad()
        sum((table.sin() * (1 + n)).sum() for n, table in enumerate(tables)).backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}

    model.start_epoch(0, torch.Generator())
    expected = tables_by_hand(model, train, present)
    found = model.embed([model.joint, view])[view]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    ours, theirs = gradients(found), gradients(expected)
    assert {key for key, value in ours.items() if value.any()} >= {"user_embedding", "item_embedding"}
    for key, value in theirs.items():
        torch.testing.assert_close(ours.get(key, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-12, msg=key)
    for ours, theirs in zip(model.embed([view])[view], expected, strict=True):  # and of the kept graph
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_the_learned_graph_is_built_once_an_epoch(build, monkeypatch):
    built = []

    def counted(*arguments):
        built.append(arguments)
        return nearest(*arguments)

    nearest = lattice.nearest
    monkeypatch.setattr(lattice, "nearest", counted)
    model = build(2)
    views = [model.only(m) for m in model.modalities]

    def step():
        built.clear()
        model.zero_grad()
        terms = model.step(triples(), views, triples(), views).loss_terms
        sum(terms.values()).backward()
        return len(built), model.projection["text"].weight.grad is not None and model.modal_weight.grad is not None

    assert step() == (2, True)  # also where no epoch was started
    for _ in range(2):
        model.start_epoch(0, torch.Generator())
        assert step() == (2, True)
        assert step() == (0, False)
        assert step() == (0, False)


def test_evaluation_builds_anew_and_leaves_the_epochs_graph(build):
    model = build(2)
    model.start_epoch(0, torch.Generator())
    kept = model.embed([model.joint])[model.joint].items.detach()
    with torch.no_grad():
        for parameter in model.projection.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.embed([model.joint])[model.joint].items, kept)
    fresh = model.eval().embed([model.joint])[model.joint].items
    assert not torch.allclose(fresh, kept)
    with torch.no_grad():
        torch.testing.assert_close(model.train().embed([model.joint])[model.joint].items, fresh, rtol=1e-12, atol=1e-13)
    assert torch.equal(model.embed([model.joint])[model.joint].items, kept)


def test_collaborative_parts(build, train):
    adjacency = torch.from_numpy(row_normalised_adjacency(train).toarray())
    for kind in ("mf", "ngcf"):
        model = build(2, collaborative=kind, n_item_layers=2)
        layers = [torch.cat([model.user_embedding, model.item_embedding])]
        x = layers[0]
        for linear, product in zip(model.collaborative.linear, model.collaborative.product, strict=True):
            x = leaky_relu(linear(adjacency @ x), 0.01) + leaky_relu(product(x * (adjacency @ x)), 0.01)
            layers.append(normalize(x))
        assert len(layers) == (3 if kind == "ngcf" else 1)
        users, items = model.eval().embed([model.joint])[model.joint]
        h = graph_by_hand(model, model.joint)
        torch.testing.assert_close(users, (sum(layers) / len(layers))[:N_USERS], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(items, (sum(layers) / len(layers))[N_USERS:] + normalize(h @ h @ model.item_embedding), rtol=1e-11, atol=1e-13)


def test_a_row_of_zeros_poisons_nothing(build, random_features):
    features = random_features(N_ITEMS)
    features["text"][3] = 0
    model = build(features=features)
    output = model.step(triples(), [model.only("text"), model.only("image")])
    sum(output.loss_terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_impossible_options(build, refuses):
    refuses(ConfigError, lambda: build(collaborative="lightgnc"), "lightgnc", "did you mean 'lightgcn'", "mf", "ngcf")
    refuses(ConfigError, lambda: build(frozen_share=1.5), "frozen_share", 1.5)
