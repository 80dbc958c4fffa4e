"""One suite that every backbone passes."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.base import Backbone, Triples
from ckd_fed.backbones.build import backbone_class, build_backbone
from ckd_fed.errors import CkdError, ConfigError
from ckd_fed.verify import TOLERANCE, verify

N_USERS, N_ITEMS = 11, 17


@pytest.fixture(params=sorted(BACKBONES))
def name(request):
    return request.param


@pytest.fixture
def build(name, random_interactions, random_features):
    """The backbone, small and in float64."""

    def make(n_modalities=2, *, seed=0, features=None, dtype=torch.float64, **options):
        train = random_interactions(N_USERS, N_ITEMS)
        features = random_features(N_ITEMS, n_modalities) if features is None else features
        return build_backbone(name, train, features, {"embedding_dim": 4, "l2": 1e-2, **options}, seed=seed, dtype=dtype)

    return make


def all_views(backbone):
    """Every set of modalities that may be present."""
    return [frozenset(some) for n in range(len(backbone.modalities) + 1) for some in combinations(backbone.modalities, n)]


def random_triples(n, seed=0):
    rng = np.random.default_rng(seed)
    return Triples(*(torch.from_numpy(rng.integers(bound, size=n)) for bound in (N_USERS, N_ITEMS, N_ITEMS)))


def margins(tables, triples):
    scores = tables.users @ tables.items.T
    return scores[triples.users, triples.first] - scores[triples.users, triples.second]


def test_reference_vectors(name):
    path = Path(__file__).parents[1] / "reference" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no reference vectors for {name}")
    errors = verify(path)
    assert len(errors) > 10
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_views_and_shapes(build, n_modalities):
    backbone = build(n_modalities)
    assert backbone.modalities == ("image", "text", "audio")[:n_modalities]
    assert backbone.joint == set(backbone.modalities)
    assert backbone.only("image") == {"image"}
    assert backbone.without("image") == set(backbone.modalities) - {"image"}
    tables = backbone.embed(all_views(backbone))
    assert set(tables) == set(all_views(backbone))
    for users, items in tables.values():
        assert users.shape == (N_USERS, items.shape[1])
        assert items.shape[0] == N_ITEMS
        assert users.dtype == items.dtype == torch.float64


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 100])  # fewer and more than the catalogue has items
def test_margins_of_a_step_are_those_of_the_tables(build, n_modalities, size):
    backbone = build(n_modalities)
    views = all_views(backbone)
    ranking, distillation = random_triples(size, 1), random_triples(size // 2, 2)
    output = backbone.step(ranking, views, distillation, views)
    tables = backbone.embed(views)
    assert set(output.ranking) == set(output.distillation) == set(views)
    for view in views:
        torch.testing.assert_close(output.ranking[view], margins(tables[view], ranking), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(output.distillation[view], margins(tables[view], distillation), rtol=1e-12, atol=1e-13)


def test_a_step_without_views_has_the_joint_one(build):
    backbone = build()
    output = backbone.step(random_triples(5))
    assert set(output.ranking) == {backbone.joint}
    assert not output.distillation
    output = backbone.step(random_triples(5), [], random_triples(4), [backbone.only("text")])
    assert set(output.ranking) == {backbone.joint}
    assert set(output.distillation) == {backbone.only("text")}


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 100])
def test_loss_and_gradients_of_a_step_are_those_of_the_tables(build, n_modalities, size):
    """BPR and L2 written out, with every margin in the sum, differentiated through the full tables."""
    backbone = build(n_modalities)
    views, ranking, distillation = all_views(backbone), random_triples(size, 1), random_triples(size // 2, 2)

    output = backbone.step(ranking, views, distillation, views)
    signal = sum((1 + n) * (output.ranking[v].tanh().sum() + output.distillation[v].tanh().sum()) for n, v in enumerate(views))
    (sum(output.loss_terms.values()) + signal).backward()
    found = {key: parameter.grad.clone() for key, parameter in backbone.named_parameters()}

    backbone.zero_grad()
    tables = backbone.embed(views)
    users, items = tables[backbone.joint]
    bpr = -margins(tables[backbone.joint], ranking).sigmoid().log().mean()
    rows = users[ranking.users], items[ranking.first], items[ranking.second]
    l2 = 1e-2 * sum(row.pow(2).sum() for row in rows) / 2 / size
    torch.testing.assert_close(output.loss_terms["bpr"], bpr)
    torch.testing.assert_close(output.loss_terms["l2"], l2)
    assert set(output.loss_terms) == {"bpr", "l2"}
    signal = sum((1 + n) * (margins(tables[v], ranking).tanh().sum() + margins(tables[v], distillation).tanh().sum()) for n, v in enumerate(views))
    (bpr + l2 + signal).backward()
    for key, parameter in backbone.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_absent_means_replaced_by_the_mean(build, n_modalities, random_features):
    backbone = build(n_modalities)
    features = random_features(N_ITEMS, n_modalities)
    for absent in all_views(backbone):
        averaged = {m: np.broadcast_to(x.mean(0), x.shape) if m in absent else x for m, x in features.items()}
        other = build(features=averaged)
        other.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            for modality in absent:
                table = other.preference[modality]
                table.copy_(table.mean(0).expand_as(table))
        view = backbone.joint - absent
        found, expected = backbone.embed([view])[view], other.embed([other.joint])[other.joint]
        torch.testing.assert_close(found.users, expected.users, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.items, expected.items, rtol=1e-12, atol=1e-13)


def test_only_the_present_modalities_matter(build, random_features):
    """An absent modality's features may be permuted at will: only their mean is seen."""
    features = random_features(N_ITEMS, 3)
    shuffled = {**features, "text": features["text"][::-1].copy()}
    one, two = build(features=features), build(features=shuffled)
    for view in all_views(one):
        same = torch.allclose(one.embed([view])[view].items, two.embed([view])[view].items, atol=1e-12)
        assert same == ("text" not in view)


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_gradients_reach_every_parameter(build, n_modalities):
    backbone = build(n_modalities)
    output = backbone.step(random_triples(200))
    sum(output.loss_terms.values()).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_state_dict_is_the_parameters_and_nothing_else(build):
    backbone, other = build(3, seed=1), build(3, seed=2)
    assert set(backbone.state_dict()) == {key for key, _ in backbone.named_parameters()}
    assert all(m in "".join(backbone.state_dict()) for m in backbone.modalities)
    other.load_state_dict(backbone.state_dict(), strict=True)
    for view in all_views(backbone):
        assert torch.equal(other.embed([view])[view].users, backbone.embed([view])[view].users)
        assert torch.equal(other.embed([view])[view].items, backbone.embed([view])[view].items)


def test_features_move_with_the_backbone(build):
    buffers = dict(build(2).half().named_buffers())
    assert {"features_image", "features_text"} <= set(buffers)
    assert all(buffers[f"features_{m}"].dtype == torch.float16 for m in ("image", "text"))


def test_initialisation_depends_on_the_seed_alone(build):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build(seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    two, three = build(seed=5).state_dict(), build(seed=6).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not any(torch.equal(one[key], three[key]) for key in one)


def test_reset_parameters_draws_everything_anew(build):
    backbone = build()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.reset_parameters()
    assert not any(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_precisions_agree(build):
    one, two = build(3, seed=5), build(3, seed=5, dtype=torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in two.parameters())
    for view in all_views(one):
        torch.testing.assert_close(two.embed([view])[view].items.double(), one.embed([view])[view].items, rtol=1e-3, atol=1e-4)


def test_the_callers_features_are_left_alone(build, random_features):
    features = random_features(N_ITEMS, 2)
    backbone = build(features=features)
    before = backbone.embed([backbone.joint])[backbone.joint].items
    features["image"][:] = 0
    assert torch.equal(backbone.embed([backbone.joint])[backbone.joint].items, before)


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_ranking_embeddings_order_items_as_the_view_does(build, n_modalities):
    backbone = build(n_modalities)
    for view in all_views(backbone):
        tables, short = backbone.embed([view])[view], backbone.ranking_embeddings([view])[view]
        assert not short.users.requires_grad
        assert not short.items.requires_grad
        difference = tables.users @ tables.items.T - short.users @ short.items.T
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-12)


def test_unknown_backbone(refuses, random_interactions, random_features):
    refuses(ConfigError, lambda: backbone_class("vpbr"), "'vpbr'", "did you mean 'vbpr'", *BACKBONES)
    train, features = random_interactions(N_USERS, N_ITEMS), random_features(N_ITEMS)
    refuses(ConfigError, lambda: build_backbone("x", train, features, {}, seed=0), "'x'", *BACKBONES)


def test_unknown_option(build, name, refuses):
    refuses(ConfigError, lambda: build(embeding_dim=3), name, "embeding_dim", "did you mean 'embedding_dim'", "l2")
    refuses(ConfigError, lambda: build(train=3), "train", "embedding_dim")


@pytest.mark.parametrize("value", [0, -4, 2.5, "64"])
def test_an_impossible_option_is_refused_in_words(build, refuses, value):
    refuses(CkdError, lambda: build(embedding_dim=value), "embedding_dim", value)


@pytest.mark.parametrize("value", [-1.0, "small"])
def test_an_impossible_l2_is_refused_in_words(build, refuses, value):
    refuses(CkdError, lambda: build(l2=value), "l2", value)


def test_every_backbone_is_one(name):
    assert issubclass(backbone_class(name), Backbone)
