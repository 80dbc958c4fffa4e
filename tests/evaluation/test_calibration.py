"""Calibrated inference: the weights are the most likely ones, and one table ranks by the weighted sum."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.build import build_backbone
from ckd_fed.evaluation.calibration import _spread, calibrate, calibration_views, combine, view_name
from ckd_fed.evaluation.ranking import evaluate

N_USERS, N_ITEMS = 40, 25
JOINT, A, B = frozenset("ab"), frozenset("a"), frozenset("b")


@pytest.fixture
def split(random_interactions):
    """(train, val): some users lack items in either."""
    train = random_interactions(N_USERS, N_ITEMS, low=0, high=5, seed=1)
    val = random_interactions(N_USERS, N_ITEMS, low=0, high=3, seed=2)
    return train, val


def random_tables(*views, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return {
        view: Embeddings(torch.from_numpy(rng.normal(size=(N_USERS, 4))).to(dtype), torch.from_numpy(rng.normal(size=(N_ITEMS, 4))).to(dtype))
        for view in views
    }


def log_likelihood(weights, tables, train, val):
    """Written out user by user."""
    total, n = 0.0, 0
    for user in range(N_USERS):
        scores = sum(w * (t.users[user] @ t.items.T).numpy() for w, t in zip(weights, tables.values(), strict=True))
        seen = train.items[train.indptr[user] : train.indptr[user + 1]]
        unseen = np.setdiff1d(np.arange(N_ITEMS), seen)
        for item in val.items[val.indptr[user] : val.indptr[user + 1]]:
            if item in unseen:
                total += scores[item] - np.log(np.exp(scores[unseen]).sum())
                n += 1
    return total / n


def without_overlap(train, val, interactions):
    rows = [np.setdiff1d(val.items[val.indptr[u] : val.indptr[u + 1]], train.items[train.indptr[u] : train.indptr[u + 1]]) for u in range(N_USERS)]
    return interactions(rows, N_ITEMS)


def test_the_weights_are_the_most_likely(split, interactions):
    train, val = split[0], without_overlap(*split, interactions)
    tables = random_tables(JOINT, A, B)
    fit = calibrate(tables, train, val)
    found = [fit.weights[view] for view in tables]
    best = minimize(lambda w: -log_likelihood(w, tables, train, val), np.zeros(3), tol=1e-10)
    np.testing.assert_allclose(found, best.x, atol=1e-3)
    assert fit.log_likelihood == pytest.approx(log_likelihood(found, tables, train, val), abs=1e-5)


def test_scales_of_the_views_do_not_matter(split, interactions):
    train, val = split[0], without_overlap(*split, interactions)
    tables = random_tables(JOINT, A)
    scaled = {view: Embeddings(table.users * factor, table.items) for (view, table), factor in zip(tables.items(), (1e3, 1e-3), strict=True)}
    one, two = calibrate(tables, train, val), calibrate(scaled, train, val)
    assert two.weights[JOINT] * 1e3 == pytest.approx(one.weights[JOINT], rel=1e-3, abs=1e-4)
    assert two.weights[A] * 1e-3 == pytest.approx(one.weights[A], rel=1e-3, abs=1e-4)


def test_a_view_that_knows_the_answer_is_found(interactions):
    """The joint view is noise, view a holds the truth: calibrated ranking is far better than joint."""
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(60, 5)), rng.normal(size=(80, 5))
    order = np.argsort(-(users @ items.T + 0.3 * rng.normal(size=(60, 80))), axis=1)
    train, val, test = (interactions([row[part] for row in order], 80) for part in (slice(0, 6, 3), slice(1, 6, 3), slice(2, 6, 3)))
    tables = {
        JOINT: Embeddings(torch.from_numpy(rng.normal(size=(60, 5))), torch.from_numpy(rng.normal(size=(80, 5)))),
        A: Embeddings(torch.from_numpy(users), torch.from_numpy(items)),
    }
    fit = calibrate(tables, train, val)
    assert fit.weights[A] > 5 * abs(fit.weights[JOINT])
    recall = {view: evaluate(table, train, test).compute()["recall@10"] for view, table in {**tables, None: combine(tables, fit.weights)}.items()}
    assert recall[None] > recall[JOINT] + 0.3
    assert recall[None] == pytest.approx(recall[A], abs=0.1)


def test_one_table_ranks_by_the_weighted_sum():
    tables = random_tables(JOINT, A, B)
    weights = {JOINT: 0.5, A: -1.25, B: 3.0}
    joined = combine(tables, weights)
    expected = sum(weight * tables[view].users @ tables[view].items.T for view, weight in weights.items())
    torch.testing.assert_close(joined.users @ joined.items.T, expected)


def test_nothing_to_fit_on_leaves_the_first_view(split, interactions):
    tables = random_tables(JOINT, A)
    fit = calibrate(tables, split[0], interactions([[]] * N_USERS, N_ITEMS))
    assert fit.weights == {JOINT: 1.0}


def test_many_users_are_sampled_evenly(split, interactions, monkeypatch):
    train, val = split[0], without_overlap(*split, interactions)
    tables = random_tables(JOINT, A)
    chosen = val.users[np.linspace(0, len(val.users) - 1, 10).astype(int)]
    theirs = interactions([val.items[val.indptr[u] : val.indptr[u + 1]] if u in chosen else [] for u in range(N_USERS)], N_ITEMS)
    expected, whole = calibrate(tables, train, theirs), calibrate(tables, train, val)
    monkeypatch.setattr("ckd_fed.evaluation.calibration._MOST_USERS", 10)
    assert calibrate(tables, train, val) == expected
    assert expected != whole


def test_the_spread_of_a_view_is_that_of_a_users_scores():
    (table,) = random_tables(A).values()
    shifted = Embeddings(table.users, table.items + 3)  # the same scores for a user but for a constant
    expected = (table.users @ table.items.T).std(1, correction=0).mean()
    torch.testing.assert_close(_spread(table), expected)
    torch.testing.assert_close(_spread(shifted), expected)


def test_views_and_their_names(random_interactions, random_features):
    backbone = build_backbone("vbpr", random_interactions(8, 12), random_features(12, 3), {"embedding_dim": 4}, seed=0)
    assert [view_name(backbone, view) for view in calibration_views(backbone)] == ["joint", "only image", "only text", "only audio"]
    teacher = build_backbone("vbpr", random_interactions(8, 12), random_features(12, 1), {"embedding_dim": 4}, seed=0)
    assert [view_name(teacher, view) for view in calibration_views(teacher)] == ["joint"]
