"""What only MGCN promises: gated content on both sides in any view, and its contrast within a batch."""

from functools import partial

import numpy as np
import pytest
import torch
from dense_graphs import nearest, sym

from ckd_fed.backbones.base import Backbone, Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.contrastive import info_nce
from ckd_fed.backbones.graph import symmetric_normalised_adjacency
from ckd_fed.errors import ConfigError

N_USERS, N_ITEMS, K = 9, 15, 4
# Items that lack a modality, which no published code knows; the other modalities are complete.
LACKING = {"text": np.arange(N_ITEMS) % 3 != 1}

TABLES = (("users",), ("first", "second"))  # what of triples indexes users, and what items


@pytest.fixture
def train(random_interactions):
    return random_interactions(N_USERS, N_ITEMS, low=0)


@pytest.fixture
def build(train, random_features):
    def make(n_modalities=3, features=None, masks=None, **options):
        features = random_features(N_ITEMS, n_modalities) if features is None else features
        options = {"embedding_dim": 4, "neighbours": K, **options}
        model = build_backbone("mgcn", train, features, options, seed=0, masks=masks, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.drift.values():
                parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(1))
        return model

    return make


def by_hand(model, train, present):
    """Behaviour and side of a view, in dense products; mean features and a uniform graph stand for an absent modality."""
    adjacency = torch.from_numpy(symmetric_normalised_adjacency(train).toarray())
    ids = torch.cat([model.user_embedding, model.item_embedding])
    behaviour = (ids + adjacency @ ids + adjacency @ adjacency @ ids) / 3
    contents = []
    for m in model.modalities:
        features = model.features(m) + model.drift[m]
        has = torch.ones(N_ITEMS, dtype=torch.bool) if model.present(m) is None else model.present(m)
        absent = model.item_embedding.mean(0) * torch.sigmoid(model.gate[m](model.projection[m](features[has].mean(0))))
        x = model.item_embedding * torch.sigmoid(model.gate[m](model.projection[m](features)))
        for _ in range(2):
            x = torch.where((has & (m in present)).unsqueeze(1), sym(nearest(model.features(m), K, has)) @ x, absent)
        contents.append(torch.cat([adjacency[:N_USERS, N_USERS:] @ x, x]))
    scores = torch.stack([model.query[2](torch.tanh(model.query[0](z))) for z in contents])
    common = (scores.softmax(0) * torch.stack(contents)).sum(0)
    special = sum(torch.sigmoid(model.preference_gate[m](behaviour)) * (z - common) for m, z in zip(model.modalities, contents, strict=True))
    return behaviour, (special + common) / (len(model.modalities) + 1)


def triples(n=12):
    generator = torch.Generator().manual_seed(2)
    return Triples(*(torch.randint(bound, (n,), generator=generator) for bound in (N_USERS, N_ITEMS, N_ITEMS)))


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
@pytest.mark.parametrize("present", [(), ("text",), ("image", "audio"), ("image", "text", "audio")], ids=str)
def test_tables_and_gradients_of_any_view(build, train, present, masks):
    model, view = build(masks=masks, n_item_layers=2), frozenset(present)

    def gradients(table):
        model.zero_grad()
        table.sin().sum().backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}

    expected = sum(by_hand(model, train, present))
    found = torch.cat(model.embed([model.joint, view])[view])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    ours, theirs = gradients(found), gradients(expected)
    for key, value in theirs.items():
        torch.testing.assert_close(ours.get(key, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-12, msg=key)


def test_losses_are_those_written_out(build, train):
    model, batch = build(2, n_item_layers=2, contrastive_weight=0.3, temperature=0.4), triples()
    terms = model.step(batch, [model.only("image")]).loss_terms
    assert set(terms) == {"bpr", "l2", "contrastive"}
    behaviour, side = by_hand(model, train, model.joint)
    expected = 0.3 * sum(info_nce(side[index], behaviour[index], 0.4) for index in (batch.users, batch.first + N_USERS))
    torch.testing.assert_close(terms["contrastive"], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("masks", [None, LACKING], ids=["complete", "lacking"])
@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_a_step_is_that_of_whole_tables_and_computes_the_rows_of_its_batches_alone(build, n_modalities, masks):
    model, ranking, distillation = build(n_modalities, masks=masks), triples(4), Triples(*torch.tensor([[0, 0, 5], [1, 2, 3], [3, 2, 9]]))
    views = [model.joint, *map(model.only, model.modalities), *map(model.without, model.modalities)]
    gated = []
    for gate in model.preference_gate.values():
        gate.register_forward_hook(lambda _module, entering, _output: gated.append(len(entering[0])))

    def numbers(step):
        model.zero_grad()
        output = step(ranking, views, distillation, views)
        margins = [*output.ranking.values(), *output.distillation.values()]
        (sum(output.loss_terms.values()) + sum(margin.tanh().sum() * (1 + n) for n, margin in enumerate(margins))).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        return {**output.loss_terms, **dict(enumerate(margins)), **gradients}

    ours, rows, theirs = numbers(model.step), list(gated), numbers(partial(Backbone.step, model))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-13, msg=key)
    users, items = ({*torch.cat([getattr(batch, name) for batch in (ranking, distillation) for name in names]).tolist()} for names in TABLES)
    assert len(users) < N_USERS
    assert rows == [len(users) + len(items)] * (n_modalities if n_modalities > 1 else 0)


def test_a_teachers_side_is_half_its_content(build, train):
    model = build(1)
    (users, items), behaviour = model.embed([model.joint])[model.joint], by_hand(model, train, model.joint)[0]
    content = model.contents([model.joint])["image", True]
    torch.testing.assert_close(torch.cat([users, items]), behaviour + content / 2, rtol=1e-11, atol=1e-13)


def test_a_row_of_zeros_poisons_nothing(build, random_features):
    features = random_features(N_ITEMS)
    features["text"][3] = 0
    model = build(features=features)
    sum(model.step(triples(), [model.only("text"), model.only("image")]).loss_terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_impossible_options(build, refuses):
    refuses(ConfigError, lambda: build(temperature=0.0), "temperature", 0.0)
