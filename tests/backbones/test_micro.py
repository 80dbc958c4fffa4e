"""What only MICRO promises: attention over modalities in any view, graphs kept for an epoch, the contrast."""

import numpy as np
import pytest
import torch
from dense_graphs import nearest, sym
from torch.nn.functional import normalize

from ckd_fed.backbones import item_graph, micro
from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.contrastive import catalogue_contrast
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
        model = build_backbone("micro", train, features, options, seed=0, masks=masks, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.drift.values():
                parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(1))
        return model

    return make


def norm(s, kind):
    return sym(s) if kind == "sym" else s / s.sum(1, keepdim=True).clamp(min=1e-300)


def by_hand(model, train, present):
    """Users, items, h, and z_m of a view, in dense products."""
    adjacency = torch.from_numpy(row_normalised_adjacency(train).toarray())
    ids = torch.cat([model.user_embedding, model.item_embedding])
    mean = (ids + adjacency @ ids + adjacency @ adjacency @ ids) / 3
    z = {}
    for m in model.modalities:
        absent = model.item_embedding.mean(0)
        z[m] = absent.expand(N_ITEMS, -1)
        if m in present:
            features, has = model.features(m), model.present(m)
            has = torch.ones(N_ITEMS, dtype=torch.bool) if has is None else has
            learned = norm(nearest(model.projection[m](features + model.drift[m]), K, has), model.normalisation)
            frozen = norm(nearest(features, K, has), model.normalisation)
            graph = (1 - model.frozen_share) * learned + model.frozen_share * frozen
            z[m] = torch.where(has.unsqueeze(1), graph @ torch.where(has.unsqueeze(1), graph @ model.item_embedding, absent), absent)
    scores = torch.stack([model.query[2](torch.tanh(model.query[0](x))) for x in z.values()])
    h = (scores.softmax(0) * torch.stack(list(z.values()))).sum(0)
    return mean[:N_USERS], mean[N_USERS:] + normalize(h), h, z


def triples(n=12):
    generator = torch.Generator().manual_seed(2)
    return Triples(*(torch.randint(bound, (n,), generator=generator) for bound in (N_USERS, N_ITEMS, N_ITEMS)))


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
@pytest.mark.parametrize("kind", ["sym", "rw"])
@pytest.mark.parametrize("present", [(), ("text",), ("image", "audio"), ("image", "text", "audio")], ids=str)
def test_tables_and_gradients_of_any_view(build, train, present, kind, masks):
    model, view = build(masks=masks, n_item_layers=2, frozen_share=0.6, normalisation=kind), frozenset(present)

    def gradients(tables):
        model.zero_grad()
        sum((table.sin() * (1 + n)).sum() for n, table in enumerate(tables)).backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}

    model.start_epoch(0, torch.Generator())
    expected = by_hand(model, train, present)[:2]
    found = model.embed([model.joint, view])[view]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    ours, theirs = gradients(found), gradients(expected)
    for key, value in theirs.items():
        torch.testing.assert_close(ours.get(key, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-12, msg=key)
    for ours, theirs in zip(model.embed([view])[view], expected, strict=True):  # and of the kept graph
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
def test_the_contrast_is_that_of_every_modality_with_the_fused(build, train, masks):
    """Over the items that have the modality."""
    for n_modalities in (1, 3):
        model = build(n_modalities, masks=masks, n_item_layers=2, contrastive_weight=0.5, temperature=0.7)
        terms = model.step(triples(), [model.only("image")]).loss_terms
        assert set(terms) == {"bpr", "l2", "contrastive"}
        _, _, h, z = by_hand(model, train, model.joint)
        having = {m: slice(None) if model.present(m) is None else model.present(m) for m in z}
        expected = 0.5 * sum(catalogue_contrast(x[having[m]], h[having[m]], 0.7) for m, x in z.items())
        torch.testing.assert_close(terms["contrastive"], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("masks", [None, {"image": LACKING["text"]}], ids=["complete", "lacking"])
def test_a_teachers_contrast_is_of_one_tensor(build, monkeypatch, masks):
    pairs = []
    monkeypatch.setattr(micro, "catalogue_contrast", lambda a, b, _: pairs.append((a, b)) or catalogue_contrast(a, b, 0.5))
    model = build(1, masks=masks)
    model.step(triples())
    (one, two), done = pairs[0], model([model.joint]).parts
    assert one is two
    assert torch.equal(done["fused"], done["content_image"])


def test_the_learned_graphs_are_built_once_an_epoch(build, monkeypatch):
    built = []

    def counted(*arguments):
        built.append(arguments)
        return item_graph.nearest(*arguments)

    monkeypatch.setattr(micro, "nearest", counted)
    model = build(2)
    views = [model.only(m) for m in model.modalities]

    def step():
        built.clear()
        model.zero_grad()
        sum(model.step(triples(), views, triples(), views).loss_terms.values()).backward()
        assert model.query[0].weight.grad is not None
        return len(built), model.projection["text"].weight.grad is not None

    assert step() == (2, True)  # also where no epoch was started
    for _ in range(2):
        model.start_epoch(0, torch.Generator())
        assert step() == (2, True)
        assert step() == (0, False)
    assert len(model.eval().embed([model.joint])) == 1
    assert len(built) == 2


def test_a_row_of_zeros_poisons_nothing(build, random_features):
    features = random_features(N_ITEMS)
    features["text"][3] = 0
    model = build(features=features)
    output = model.step(triples(), [model.only("text"), model.only("image")])
    sum(output.loss_terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_impossible_options(build, refuses):
    refuses(ConfigError, lambda: build(collaborative="x"), "collaborative", "'x'", "lightgcn")
    refuses(ConfigError, lambda: build(normalisation="row"), "normalisation", "'row'", "rw", "sym")
    refuses(ConfigError, lambda: build(temperature=0.0), "temperature", 0.0)
