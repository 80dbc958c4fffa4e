"""What only GRCN promises: refined edges, routing, its regulariser; on a dense matrix with isolated users and items."""

import pytest
import torch
import torch.nn.functional as F

from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.errors import ConfigError

N_USERS, N_ITEMS = 8, 12


@pytest.fixture
def train(random_interactions):
    return random_interactions(N_USERS, N_ITEMS, low=0, high=4)


@pytest.fixture
def build(train, random_features):
    def make(n_modalities=3, **options):
        features = random_features(N_ITEMS, n_modalities)
        return build_backbone("grcn", train, features, {"embedding_dim": 4, **options}, seed=0, dtype=torch.float64)

    return make


def by_hand(model, train, features, view, n_routing):
    """Final rows of users and items, from the definition, one matrix ``(targets, sources)`` a modality."""
    state, n = model.state_dict(), N_USERS + N_ITEMS
    linked = torch.zeros(n, n, dtype=torch.bool)
    linked[train.row, train.items + N_USERS] = True
    linked |= linked.T.clone()

    def softmax(logits, edges):
        return torch.softmax(torch.where(edges, logits, -torch.inf), 1).nan_to_num(0)

    reps, weights = [], []
    for column, m in enumerate(model.modalities):
        p, f = state[f"preference.{m}"], torch.from_numpy(features[m])
        if m not in view:
            p, f = p.mean(0).expand_as(p), f.mean(0).expand_as(f)
        p = F.normalize(p)
        f = F.normalize(F.leaky_relu(f @ state[f"projection.{m}.weight"].T + state[f"projection.{m}.bias"]))
        for _ in range(n_routing):
            p = F.normalize(p + softmax(p @ f.T, linked[:N_USERS, N_USERS:]) @ f)
        x = torch.cat([p, f])
        alpha = softmax(x @ x.T, linked)
        reps.append(x + alpha @ x)
        weights.append(alpha * state["confidence"][:, column])  # of the source
    weight = torch.where(linked, torch.stack(weights).amax(0), 0).relu()
    x = F.normalize(state["id_embedding"])
    return torch.cat([x + weight @ x + weight @ weight @ x, *reps], dim=1)


@pytest.mark.parametrize(("options", "n_routing"), [({}, 0), ({"routing": "paper"}, 3), ({"routing": "paper", "n_routing": 1}, 1)])
def test_embeddings_by_hand(build, train, random_features, options, n_routing):
    model = build(**options)
    for view in (model.joint, model.only("text"), model.without("text"), frozenset()):
        expected = by_hand(model, train, random_features(N_ITEMS, 3), view, n_routing)
        torch.testing.assert_close(torch.cat(model.embed([view])[view]), expected, rtol=1e-11, atol=1e-13)


def test_a_teacher_has_one_column_of_confidences(build):
    assert build(1).confidence.shape == (N_USERS + N_ITEMS, 1)
    assert build(3).confidence.shape == (N_USERS + N_ITEMS, 3)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_confidences_exist_only_where_they_count(build, mode):
    assert "confidence" not in build(weight_mode=mode).state_dict()


def test_with_one_modality_all_weight_modes_without_confidences_are_its_attention(build):
    one, two = build(1, weight_mode="mean"), build(1, weight_mode="max")
    assert torch.equal(torch.cat(one.embed([one.joint])[one.joint]), torch.cat(two.embed([two.joint])[two.joint]))


@pytest.mark.parametrize("regulariser", ["authors", "mmrec"])
def test_regulariser_by_hand(build, regulariser):
    model = build(l2=0.5, regulariser=regulariser)
    users, first, second = triples = Triples(torch.tensor([0, 3, 3]), torch.tensor([1, 2, 11]), torch.tensor([5, 6, 0]))
    ids, preferences = model.id_embedding.square(), [model.preference[m].square() for m in model.modalities]
    items = torch.cat([ids[N_USERS + first], ids[N_USERS + second]])
    expected = ids[users].mean() + items.mean() + sum(table[users].mean() for table in preferences)
    expected = expected + preferences[0].mean() if regulariser == "mmrec" else expected
    torch.testing.assert_close(model.step(triples).loss_terms["l2"], 0.5 * expected)


@pytest.mark.parametrize("option", ["routing", "weight_mode", "fusion_mode", "regulariser"])
def test_an_unknown_choice_is_refused(build, refuses, option):
    refuses(ConfigError, lambda: build(**{option: "other"}), f"model.{option}", "other", "choices")
