"""One suite that every backbone passes."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.base import Backbone, Embeddings, RankingBatch, Triples
from ckd_fed.backbones.build import backbone_class, build_backbone, check_options
from ckd_fed.commands.keys import described_options
from ckd_fed.config import resolve
from ckd_fed.errors import CkdError, ConfigError
from ckd_fed.verify import TOLERANCE, verify

N_USERS, N_ITEMS = 11, 17

#: Backbones whose absent modality is its mean features and mean preference, as in CKD's published code.
MEAN_FEATURES = ("vbpr", "mmgcn", "grcn", "egogcn")
#: Parameters that only weigh modalities against each other.
BETWEEN_MODALITIES = {"lattice": ("modal_weight",), "micro": ("query.",), "mgcn": ("query.", "preference_gate.")}


@pytest.fixture(params=sorted(BACKBONES))
def name(request):
    return request.param


@pytest.fixture
def build(name, random_interactions, random_features):
    """The backbone, small and in float64."""

    def make(n_modalities=2, *, seed=0, features=None, masks=None, dtype=torch.float64, feature_dtype=None, **options):
        train = random_interactions(N_USERS, N_ITEMS)
        features = random_features(N_ITEMS, n_modalities) if features is None else features
        options = {"embedding_dim": 4, "l2": 1e-2, **options}
        return build_backbone(name, train, features, options, seed=seed, masks=masks, dtype=dtype, feature_dtype=feature_dtype)

    return make


def all_views(backbone):
    """Every set of modalities that may be present."""
    return [frozenset(some) for n in range(len(backbone.modalities) + 1) for some in combinations(backbone.modalities, n)]


def random_triples(n, seed=0):
    rng = np.random.default_rng(seed)
    return Triples(*(torch.from_numpy(rng.integers(bound, size=n)) for bound in (N_USERS, N_ITEMS, N_ITEMS)))


def drawn(state):
    """Names of the parameters that are drawn at random: a bias or a drift may start from a constant."""
    names = [key for key, value in state.items() if value.unique().numel() > 1]
    assert len(names) >= 2
    return names


def margins(tables, triples):
    scores = tables.users @ tables.items.T
    return scores[triples.users, triples.first] - scores[triples.users, triples.second]


def begin(backbone, epoch=0):
    """Start an epoch as the trainer does."""
    backbone.train()
    backbone.start_epoch(epoch, torch.Generator().manual_seed(epoch))
    return backbone


def reference_files(name):
    directory = Path(__file__).parents[1] / "reference"
    return [*directory.glob(f"{name}.npz"), *(directory / "backbones").glob(f"{name}.npz"), *(directory / "backbones").glob(f"{name}_*.npz")]


def test_reference_vectors(name):
    assert reference_files(name)
    for path in reference_files(name):
        errors = verify(path)
        assert len(errors) >= 3
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
    """Every margin and every loss of a step, differentiated; then the same by indexing the full tables."""
    backbone = build(n_modalities)
    views, ranking, distillation = all_views(backbone), random_triples(size, 1), random_triples(size // 2, 2)

    def signal(of_ranking, of_distillation):
        return sum((1 + n) * (of_ranking[v].tanh().sum() + of_distillation[v].tanh().sum()) for n, v in enumerate(views))

    output = begin(backbone).step(ranking, views, distillation, views)
    (sum(output.loss_terms.values()) + signal(output.ranking, output.distillation)).backward()
    found = {key: parameter.grad.clone() for key, parameter in backbone.named_parameters() if parameter.grad is not None}

    backbone.zero_grad()
    done = begin(backbone)(views)
    margin = {view: margins(tables, ranking) for view, tables in done.tables.items()}
    users, items = done.tables[backbone.joint]
    rows = users[ranking.users], items[ranking.first], items[ranking.second]
    terms = backbone.losses(RankingBatch(ranking, margin[backbone.joint], rows, done.parts))
    assert output.loss_terms.keys() == terms.keys()
    for key, term in terms.items():
        assert term.shape == ()
        torch.testing.assert_close(output.loss_terms[key], term)
    (sum(terms.values()) + signal(margin, {view: margins(tables, distillation) for view, tables in done.tables.items()})).backward()
    for key, parameter in backbone.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-11, msg=key)


def test_the_losses_are_those_written_out(build, name):
    """BPR and L2, for the backbones that are trained by these two alone."""
    backbone, ranking = begin(build(3)), random_triples(50, 1)
    output = backbone.step(ranking)
    users, items = begin(backbone).embed([backbone.joint])[backbone.joint]
    bpr = -margins(Embeddings(users, items), ranking).sigmoid().log().mean()
    if "bpr" in output.loss_terms:
        torch.testing.assert_close(output.loss_terms["bpr"], bpr)
    if name in ("vbpr", "mmgcn", "lattice", "micro", "mgcn"):
        rows = users[ranking.users], items[ranking.first], items[ranking.second]
        torch.testing.assert_close(output.loss_terms["l2"], 1e-2 * sum(row.pow(2).sum() for row in rows) / 2 / 50)
    if name in ("vbpr", "mmgcn"):
        assert set(output.loss_terms) == {"bpr", "l2"}


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_views_differ_exactly_where_scores_use_features(build, n_modalities):
    backbone = build(n_modalities)
    views = all_views(backbone)
    tables = backbone.embed(views)
    for one, two in combinations(views, 2):
        same = torch.allclose(margins(tables[one], random_triples(60)), margins(tables[two], random_triples(60)))
        assert same != backbone.scores_use_features


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_absent_means_replaced_by_the_mean(build, name, n_modalities, random_features):
    if name not in MEAN_FEATURES:
        pytest.skip("absence of this backbone is defined on its item graph; its reference file holds the numbers")
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
        assert same == ("text" not in view or not one.scores_use_features)


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
def test_gradients_reach_every_parameter(build, name, n_modalities):
    backbone = begin(build(n_modalities))
    output = backbone.step(random_triples(200))
    sum(output.loss_terms.values()).backward()
    reached = {key for key, parameter in backbone.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    missed = {key for key, _ in backbone.named_parameters()} - reached
    if n_modalities == 1:  # with nothing to be weighed against, weights between modalities have no effect
        missed = {key for key in missed if not key.startswith(BETWEEN_MODALITIES.get(name, ()))}
    assert not missed


@pytest.mark.parametrize("n_modalities", [1, 2])
def test_a_drift_of_an_item_that_lacks_the_modality_is_neither_trained_nor_read(build, n_modalities):
    present = np.arange(N_ITEMS) % 3 != 1
    one, two = (begin(build(n_modalities, masks={"image": present})) for _ in range(2))
    if not hasattr(one, "drift"):
        pytest.skip("features are constants of this backbone")
    with torch.no_grad():
        two.drift["image"][~present] = 3.0
    outputs = [model.step(random_triples(50, 1), all_views(model), random_triples(30, 2), all_views(model)) for model in (one, two)]
    for key, term in outputs[0].loss_terms.items():
        assert torch.equal(term, outputs[1].loss_terms[key]), key
    for view in all_views(one):
        assert torch.equal(outputs[0].distillation[view], outputs[1].distillation[view])
    sum((*outputs[0].loss_terms.values(), *(margin.square().sum() for margin in outputs[0].distillation.values()))).backward()
    assert not one.drift["image"].grad[~present].any()
    assert one.drift["image"].grad[present].any()


def test_a_batch_of_items_that_lack_the_modality(build):
    """Terms that have nothing to be taken over are 0."""
    present = np.arange(N_ITEMS) % 3 != 1
    backbone = begin(build(2, masks={"image": present}))
    lacking = torch.from_numpy(np.flatnonzero(~present))
    output = backbone.step(Triples(torch.tensor([0, 1, 2]), lacking[:3], lacking[1:4]), [backbone.only("image")])
    total = sum(output.loss_terms.values())
    total.backward()
    assert total.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in backbone.parameters())


def test_constant_views_keep_less_and_change_no_number(build, name):
    """The margins of a constant view, and losses and gradients of all others, to the bit."""
    ranking, distillation = random_triples(50, 1), random_triples(30, 2)

    def numbers(constant):
        backbone, kept = begin(build(3)), []
        joint, only = backbone.joint, [backbone.only(m) for m in backbone.modalities]
        without = [backbone.without(m) for m in backbone.modalities]
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
            backbone.constant(without if constant else ()),
        ):
            output = backbone.step(ranking, [*only, *without], distillation, only)
        terms = [*output.loss_terms.values(), *(output.ranking[view].tanh().sum() for view in (joint, *only))]
        sum((*terms, *(output.distillation[view].tanh().sum() for view in only))).backward()
        gradients = {key: parameter.grad for key, parameter in backbone.named_parameters() if parameter.grad is not None}
        return {**output.loss_terms, **output.ranking, **gradients}, sum(kept)

    (expected, all_kept), (found, kept) = numbers(constant=False), numbers(constant=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    if name in ("egogcn", "grcn", "lattice", "mgcn", "micro", "mmgcn"):
        assert kept < 0.95 * all_kept


def test_an_epoch_repeats_bit_for_bit(build):
    """Two builds, the same epochs: the same numbers; another epoch may draw another graph or dropout, and coming back repeats the first."""

    def epoch(backbone, number):
        begin(backbone, number)
        outputs = [backbone.step(random_triples(30, seed), [backbone.only("image")]) for seed in range(3)]
        return [term for output in outputs for term in (*output.loss_terms.values(), *output.ranking.values())]

    one, two = build(2), build(2)
    first, second = epoch(one, 0), epoch(two, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    epoch(one, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(one, 0), strict=True))


def test_evaluation_ignores_the_epoch_and_changes_nothing(build):
    one, two = build(2), build(2)
    begin(one, 3).step(random_triples(30))
    before = {key: value.clone() for key, value in one.state_dict().items()}
    two.load_state_dict(before)
    views = all_views(one)
    ours, fresh = one.eval().embed(views), two.eval().embed(views)
    for view in views:
        assert torch.equal(ours[view].users, fresh[view].users)
        assert torch.equal(ours[view].items, fresh[view].items)
    assert all(torch.equal(before[key], value) for key, value in one.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_numbers(build):
    one, two = build(2), build(2).to("cuda")
    views = all_views(one)
    for tables, other in zip(one.eval().embed(views).values(), two.eval().embed(views).values(), strict=True):
        torch.testing.assert_close(other.items.cpu(), tables.items, rtol=1e-9, atol=1e-11)
    triples = random_triples(30)
    moved = Triples(*(index.to("cuda") for index in triples))
    ours, theirs = begin(one).step(triples, views, triples, views), begin(two).step(moved, views, moved, views)
    for key, term in ours.loss_terms.items():
        torch.testing.assert_close(theirs.loss_terms[key].cpu(), term, rtol=1e-9, atol=1e-11)
    for view in views:
        torch.testing.assert_close(theirs.ranking[view].cpu(), ours.ranking[view], rtol=1e-9, atol=1e-11)


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
    assert not any(torch.equal(one[key], three[key]) for key in drawn(one))


def test_reset_parameters_draws_everything_anew(build):
    backbone = build()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.reset_parameters()
    after = backbone.state_dict()
    assert not any(torch.equal(before[key], after[key]) for key in drawn(before))


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


def test_features_in_a_narrower_type(build, name, refuses):
    """Parameters, margins and losses stay float32, and a step is nearly the exact one; where a backbone trains its features it is refused."""
    if not backbone_class(name).projects_features:
        refuses(ConfigError, lambda: build(dtype=torch.float32, feature_dtype=torch.bfloat16), "training.feature-dtype", "bfloat16", name, "float32")
        return
    exact, narrow = (build(dtype=torch.float32, feature_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert {narrow.get_buffer(f"features_{m}").dtype for m in narrow.modalities} == {torch.bfloat16}
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}
    assert narrow.state_dict().keys() == exact.state_dict().keys()
    views, ranking, distillation = all_views(exact), random_triples(100, 1), random_triples(50, 2)
    found, expected = (begin(one).step(ranking, views, distillation, views) for one in (narrow, exact))
    for view in views:
        torch.testing.assert_close(found.ranking[view], expected.ranking[view], rtol=0, atol=0.05)
        torch.testing.assert_close(found.distillation[view], expected.distillation[view], rtol=0, atol=0.05)
    assert not torch.equal(found.ranking[exact.joint], expected.ranking[exact.joint])
    losses = [sum(output.loss_terms.values()) for output in (found, expected)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    for loss in losses:
        loss.backward()
    for (key, ours), theirs in zip(narrow.named_parameters(), exact.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad.dtype == torch.float32, key
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.1, atol=0.02, msg=key)


def test_unknown_option(build, name, refuses):
    refuses(ConfigError, lambda: build(embeding_dim=3), name, "embeding-dim", "did you mean 'embedding-dim'", "l2")
    refuses(ConfigError, lambda: build(train=3), "train", "embedding-dim")


def test_options_may_be_hyphenated(build, name):
    check_options(name, {"embedding-dim": 8})
    hyphenated, plain = build(**{"embedding-dim": 8}), build(embedding_dim=8)
    assert {key: x.shape for key, x in hyphenated.state_dict().items()} == {key: x.shape for key, x in plain.state_dict().items()}


def test_options_are_described(name):
    """From the class itself: with the defaults of a run, and a meaning for each."""
    described = {key.name.removeprefix("model."): key for key in described_options(name)}
    check_options(name, {option: key.default for option, key in described.items()})
    for option, value in resolve({"backbone": name}).model.items():
        assert described[option.replace("_", "-")].default == value
    for option, key in described.items():
        assert key.help, option
        assert not re.search(r":class:|``|^see", key.help), option


@pytest.mark.parametrize("value", [0, -4, 2.5, "64"])
def test_an_impossible_option_is_refused_in_words(build, refuses, value):
    refuses(CkdError, lambda: build(embedding_dim=value), "model.embedding-dim", value)


@pytest.mark.parametrize("value", [-1.0, "small"])
def test_an_impossible_l2_is_refused_in_words(build, refuses, value):
    refuses(CkdError, lambda: build(l2=value), "l2", value)


def test_every_backbone_is_one(name):
    assert issubclass(backbone_class(name), Backbone)
