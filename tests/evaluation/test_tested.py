"""A test in parts: shares of the users, groups, and warm and cold items apart."""

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.evaluation import tested
from ckd_fed.evaluation.metrics import RankingMetrics
from ckd_fed.evaluation.ranking import evaluate
from ckd_fed.evaluation.tested import add_warm_and_cold, merge_shares, rank_test_users

N_USERS, N_ITEMS, COLD = 40, 30, (3, 11, 12, 29)


ENOUGH = tested.ENOUGH


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(tested, "ENOUGH", 0)


def of_scores(scores):
    """Tables whose inner products are a score matrix."""
    return Embeddings(torch.tensor(scores, dtype=torch.float64), torch.eye(len(scores[0]), dtype=torch.float64))


@pytest.fixture
def tables():
    rng = np.random.default_rng(3)
    return Embeddings(*(torch.from_numpy(rng.normal(size=(n, 8))) for n in (N_USERS, N_ITEMS)))


@pytest.fixture
def split(random_interactions):
    """Training items among those that are not cold; test items among all, disjoint from them."""
    mask = ~np.isin(np.arange(N_ITEMS), COLD)
    train = random_interactions(N_USERS, N_ITEMS, low=2, high=6, seed=1).of_items(mask)
    test = random_interactions(N_USERS, N_ITEMS, low=0, high=6, seed=2)
    doubled = train.contains(test.row, test.items)
    return train, type(test).from_pairs(test.row[~doubled], test.items[~doubled], N_USERS, N_ITEMS)


def test_interactions_of_some_items(random_interactions):
    whole = random_interactions(N_USERS, N_ITEMS, seed=5)
    mask = np.arange(N_ITEMS) % 2 == 0
    some = whole.of_items(mask)
    assert some.n_users == N_USERS
    assert list(zip(some.row, some.items, strict=True)) == [(u, i) for u, i in zip(whole.row, whole.items, strict=True) if i % 2 == 0]
    assert 0 < len(some) < len(whole)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_cold_and_warm_items_compete_among_themselves(workers, tables, split):
    """By hand, user by user: the lists hold items of one kind only, recall counts held-out items of that kind, over users that have any."""
    train, test = split
    assert not train.warm[list(COLD)].any()
    whole = RankingMetrics((2, 20))
    for worker in range(workers):
        metrics = evaluate(tables, train, test, (2, 20), (worker, workers))
        add_warm_and_cold(metrics, tables, train, test, (worker, workers))
        whole.merge(metrics.sums, metrics.n_users)
    found = whole.compute()
    assert found["recall@20"] == pytest.approx(evaluate(tables, train, test, (2, 20)).compute()["recall@20"])
    assert not any(name.endswith("/users") for name in found)
    scores = (tables.users @ tables.items.T).numpy()
    for kind, items in (("warm", train.warm), ("cold", ~train.warm)):
        recalls = []
        for user in range(N_USERS):
            relevant = {int(i) for i in test.items[test.indptr[user] : test.indptr[user + 1]] if items[i]}
            seen = set(train.items[train.indptr[user] : train.indptr[user + 1]].tolist())
            ranked = [i for i in np.argsort(-scores[user]) if items[i] and int(i) not in seen]
            if relevant:
                recalls.append(len(relevant & {int(i) for i in ranked[:2]}) / len(relevant))
        assert 0 < len(recalls) < N_USERS
        assert found[f"{kind}/recall@2"] == pytest.approx(np.mean(recalls))


def test_nothing_is_said_of_warm_and_cold_where_all_items_are_trained(tables, split, monkeypatch):
    train, test = split
    metrics = evaluate(tables, train, test.of_items(train.warm), (2, 20))
    before = dict(metrics.sums)
    add_warm_and_cold(metrics, tables, train, test.of_items(train.warm))
    assert metrics.sums == before
    monkeypatch.setattr(tested, "ENOUGH", 10)
    add_warm_and_cold(metrics, tables, train, test)  # 4 cold items are fewer than ten lists of 20
    assert metrics.sums == before
    monkeypatch.setattr(tested, "ENOUGH", 0)
    only_cold = test.of_items(~train.warm)
    metrics = evaluate(tables, train, only_cold, (2, 20))
    add_warm_and_cold(metrics, tables, train, only_cold)
    assert {name.split("/")[0] for name in metrics.sums if "/" in name} == {"cold"}


@pytest.mark.parametrize("workers", [2, 3])
def test_shares_merge_to_the_whole(workers, tables, split):
    train, test = split
    whole = rank_test_users("student", tables, train, test, (2, 20))
    merged = merge_shares([rank_test_users("student", tables, train, test, (2, 20), (worker, workers)) for worker in range(workers)])
    np.testing.assert_array_equal(merged.users, whole.users)
    assert merged.values.keys() == whole.values.keys()
    for name, column in whole.values.items():
        np.testing.assert_array_equal(merged.values[name], column)
    assert len(merged.groups) == len(whole.groups)
    for ours, theirs in zip(merged.groups, whole.groups, strict=True):
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(("cold", "said"), [(19, False), (20, True)])
def test_enough_cold_items_are_ten_lists(cold, said, interactions, monkeypatch):
    monkeypatch.setattr(tested, "ENOUGH", ENOUGH)
    n = 10 + cold
    train, test, table = interactions([list(range(10))], n), interactions([[n - 1]], n), of_scores([np.arange(float(n)).tolist()])
    metrics = evaluate(table, train, test, (1, 2))
    add_warm_and_cold(metrics, table, train, test)
    assert ("cold/recall@2" in metrics.sums) == said


def test_shares_count_each_cold_user_once(interactions):
    train, test = interactions([[0]] * 6, 25), interactions([[24]] * 6, 25)
    table, whole = of_scores(np.random.default_rng(0).normal(size=(6, 25)).tolist()), RankingMetrics((1, 2))
    for worker in range(3):
        metrics = evaluate(table, train, test, (1, 2), (worker, 3))
        add_warm_and_cold(metrics, table, train, test, (worker, 3))
        whole.merge(metrics.sums, metrics.n_users)
    assert whole.sums["cold/users"] == 6
