"""What only EgoGCN promises: fusion on edges, gates for every pair, projected preferences; on a dense matrix with isolated nodes."""

import numpy as np
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
        return build_backbone("egogcn", train, features, {"embedding_dim": 4, **options}, seed=0, dtype=torch.float64)

    return make


@pytest.fixture
def triples():
    return Triples(torch.tensor([0, 3, 3, 7]), torch.tensor([1, 2, 11, 0]), torch.tensor([5, 6, 0, 3]))


def by_hand(model, train, features, view):
    """Final rows of users and items from the definition, with one vector for every pair (target, source)."""
    state, n, modalities = model.state_dict(), N_USERS + N_ITEMS, model.modalities
    linked = torch.zeros(n, n, dtype=torch.float64)
    linked[train.row, train.items + N_USERS] = 1
    linked += linked.T.clone()

    def softmax(logits):
        return torch.softmax(torch.where(linked > 0, logits, -torch.inf), 1).nan_to_num(0)

    x = {}
    for m in modalities:
        p, f = F.normalize(state[f"preference.{m}"]), torch.from_numpy(features[m])
        if m not in view:
            p, f = F.normalize(p.mean(0).expand_as(p)), f.mean(0).expand_as(f)
        x[m] = torch.cat([p, F.normalize(F.leaky_relu(f @ state[f"projection.{m}.weight"].T + state[f"projection.{m}.bias"]))])
    blocks = []
    for m in modalities:
        alpha = softmax(x[m] @ x[m].T)
        sent = x[m].expand(n, n, -1)  # (target, source, d)
        if model.fusion == "hard":
            sent = torch.where((alpha > model.threshold)[..., None], torch.stack([*x.values()]).mean(0).expand(n, n, -1), sent)
        else:
            for o in modalities:
                if o != m:
                    gate = torch.sigmoid(x[o] @ state[f"gate.{m}.{o}.weight"].T + state[f"gate.{m}.{o}.bias"])
                    sent = sent + (gate * x[o]).expand(n, n, -1)
            sent = sent / len(modalities)
        if model.reattention:
            alpha = softmax(torch.einsum("td,tsd->ts", x[m], sent))
        y = F.normalize(torch.einsum("ts,tsd->td", alpha, sent))
        for _ in range(model.n_routing):
            y = F.normalize(y + softmax(y @ y.T) @ y)
        blocks.append(y)
    degree = linked.sum(1)
    scale = torch.where(degree > 0, degree, 1) ** -0.5
    adjacency = scale[:, None] * linked * scale
    ids = F.normalize(state["id_embedding"])
    return torch.cat([ids + adjacency @ ids + 2 * adjacency @ adjacency @ ids, *blocks], dim=1)


@pytest.mark.parametrize("fusion", ["soft", "hard"])
@pytest.mark.parametrize("reattention", [True, False])
@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_embeddings_by_hand(build, train, random_features, fusion, reattention, n_modalities):
    model = build(n_modalities, fusion=fusion, reattention=reattention, threshold=0.4, n_routing=2)
    for view in (model.joint, model.only("image"), model.without("image"), frozenset()):
        expected = by_hand(model, train, random_features(N_ITEMS, n_modalities), view)
        torch.testing.assert_close(torch.cat(model.embed([view])[view]), expected, rtol=1e-11, atol=1e-13)


def test_a_gate_for_every_ordered_pair(build):
    pairs = {key.removesuffix(".weight") for key in build(3).state_dict() if key.startswith("gate") and key.endswith("weight")}
    assert pairs == {f"gate.{one}.{other}" for one in ("image", "text", "audio") for other in ("image", "text", "audio") if one != other}
    for model in (build(1), build(3, fusion="hard")):
        assert not any(key.startswith("gate") for key in model.state_dict())


def scale_preferences(model, factor):
    with torch.no_grad():
        for table in model.preference.values():
            table.mul_(torch.linspace(*factor, N_USERS, dtype=table.dtype)[:, None])


def test_a_training_forward_projects_the_preferences_and_an_evaluation_does_not(build):
    model = build()
    scale_preferences(model, (0.5, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    views = [model.joint, model.only("text")]
    evaluated = model.eval().embed(views)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    trained = model.train().embed(views)
    for key, value in model.state_dict().items():
        expected = F.normalize(before[key]) if key.startswith("preference") else before[key]
        torch.testing.assert_close(value, expected, rtol=1e-15, atol=0)
    for view in views:
        torch.testing.assert_close(torch.cat(evaluated[view]), torch.cat(trained[view]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projecting_twice_is_projecting_once_bit_for_bit(build, dtype):
    model = build().to(dtype)
    scale_preferences(model, (0.5, 3))
    model.project_preferences()
    once = {m: table.clone() for m, table in model.preference.items()}
    model.project_preferences()
    assert all(torch.equal(once[m], table) for m, table in model.preference.items())


def test_gradients_are_not_those_through_a_normalisation(build, triples):
    """They have a radial part, as in the published code; a gradient through the normalisation would be tangential."""
    model = build()
    model.step(triples).loss_terms["bpr"].backward()
    for table in model.preference.values():
        assert (table.grad * table).sum(1).abs().max() > 1e-6


def test_regulariser_by_hand(build, triples):
    model = build(l2=0.5)
    scale_preferences(model, (0.5, 3))
    users, first, second = triples
    ids = model.id_embedding.square()
    expected = ids[users].mean() + torch.cat([ids[N_USERS + first], ids[N_USERS + second]]).mean() + 3 / 4  # unit norm: 1/d a modality
    for training in (False, True):
        torch.testing.assert_close(model.train(training).step(triples).loss_terms["l2"], 0.5 * expected)


def test_towers_hear_each_other(build):
    """A modality's absence changes every tower, and not the ID tower."""
    model = build()
    tables = model.embed([model.joint, model.without("text")])
    joint, without = (torch.cat(tables[view]).unflatten(1, (4, 4)).detach().numpy() for view in (model.joint, model.without("text")))
    np.testing.assert_array_equal(joint[:, 0], without[:, 0])
    assert all(np.abs(joint[:, tower] - without[:, tower]).max() > 1e-3 for tower in (1, 2, 3))


def test_an_unknown_fusion_is_refused(build, refuses):
    refuses(ConfigError, lambda: build(fusion="sotf"), "model.fusion", "'sotf'", "did you mean 'soft'", "hard")
