"""Full ranking against a plain loop over users and items."""

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.errors import TrainingError
from ckd_fed.evaluation import ranking
from ckd_fed.evaluation.metrics import RankingMetrics
from ckd_fed.evaluation.ranking import evaluate, top_items

N_USERS, N_ITEMS = 40, 35


@pytest.fixture
def problem(interactions):
    """Embeddings, train and held-out items; some users lack training items, some held-out ones, one ranks only what it was trained on."""
    rng = np.random.default_rng(0)
    train, held_out = [], []
    for user in range(N_USERS):
        order = rng.permutation(N_ITEMS)
        n_train, n_held = (0 if user % 5 == 0 else int(rng.integers(1, 20))), (0 if user % 7 == 0 else int(rng.integers(1, 6)))
        train.append(order[:n_train])
        held_out.append(order[n_train : n_train + n_held])
    train[3], held_out[3] = np.arange(N_ITEMS - 1), np.array([N_ITEMS - 1])
    generator = torch.Generator().manual_seed(0)
    tables = Embeddings(*(torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (N_USERS, N_ITEMS)))
    return tables, interactions(train, N_ITEMS), interactions(held_out, N_ITEMS)


def items_of(interactions, user):
    return set(interactions.items[interactions.indptr[user] : interactions.indptr[user + 1]].tolist())


def naive(tables, train, held_out, ks, users=None):
    """Sort all items of each user in Python; training items come last."""
    metrics = RankingMetrics(tuple(sorted(ks)))
    for user in range(train.n_users) if users is None else users:
        seen, relevant = items_of(train, user), items_of(held_out, user)
        if not relevant:
            continue
        scores = {item: float(tables.users[user] @ tables.items[item]) for item in range(train.n_items) if item not in seen}
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)[: max(ks)]
        hits = [item in relevant for item in ranked] + [False] * (max(ks) - len(ranked))
        metrics.update(np.array([hits]), np.array([len(relevant)]))
    return metrics


@pytest.mark.parametrize("ks", [(10, 20), (20, 10), (1,), (5, 50)])  # 50 exceeds the catalogue
def test_against_a_loop(problem, ks):
    expected, found = naive(*problem, ks), evaluate(*problem, ks)
    assert found.n_users == expected.n_users == sum(user % 7 > 0 for user in range(N_USERS))
    assert found.compute() == pytest.approx(expected.compute(), rel=1e-12)


@pytest.mark.parametrize("scores", [1, N_ITEMS, 3 * N_ITEMS, 3 * N_ITEMS + 1, 34 * N_ITEMS])
def test_blocks_do_not_matter(problem, monkeypatch, scores):
    whole = evaluate(*problem)
    monkeypatch.setitem(ranking._BLOCK_SCORES, "cpu", scores)
    monkeypatch.setattr(ranking, "_BLOCK_USERS", 1)
    assert evaluate(*problem).compute() == pytest.approx(whole.compute(), rel=1e-12)


@pytest.mark.parametrize(("least", "scores", "expected"), [(5, 1, 5), (5, 8 * N_ITEMS, 8), (10**6, 1, N_USERS)], ids=["least", "scores", "all"])
def test_users_of_a_block(problem, monkeypatch, least, scores, expected):
    tables, train = problem[:2]
    monkeypatch.setitem(ranking._BLOCK_SCORES, "cpu", scores)
    monkeypatch.setattr(ranking, "_BLOCK_USERS", least)
    blocks = [len(users) for users, _ in top_items(tables, train, np.arange(N_USERS), 3)]
    assert max(blocks) == blocks[0] == expected
    assert sum(blocks) == N_USERS


@pytest.mark.parametrize("workers", [2, 3, 100])
def test_shares_merge_to_the_whole(problem, workers):
    merged = RankingMetrics()
    for worker in range(workers):
        part = evaluate(*problem, share=(worker, workers))
        merged.merge(part.sums, part.n_users)
    whole = evaluate(*problem)
    assert merged.n_users == whole.n_users
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_training_items_are_masked_even_where_they_score_highest(interactions):
    tables = Embeddings(torch.ones(1, 1), torch.tensor([[3.0], [2.0], [1.0], [0.0]]))
    found = evaluate(tables, interactions([[0, 1]], 4), interactions([[2]], 4), (1, 2)).compute()
    assert found["recall@1"] == 1.0
    unmasked = evaluate(tables, interactions([[]], 4), interactions([[2]], 4), (1, 2)).compute()
    assert unmasked["recall@2"] == 0.0


def test_users_without_training_items_count(interactions):
    tables = Embeddings(torch.tensor([[1.0], [-1.0]]), torch.arange(4.0)[:, None])
    metrics = evaluate(tables, interactions([[], []], 4), interactions([[3], [3]], 4), (1,))
    assert metrics.n_users == 2
    assert metrics.compute()["recall@1"] == 0.5


def test_masked_items_are_no_hits_where_the_list_is_short(interactions):
    """Three of four items are trained on: the list of two ends in a masked one."""
    tables = Embeddings(torch.ones(1, 1), torch.arange(4.0)[:, None])
    found = evaluate(tables, interactions([[1, 2, 3]], 4), interactions([[0]], 4), (1, 2)).compute()
    assert found["recall@1"] == 1.0
    assert found["precision@2"] == 0.5


def test_fewer_items_than_k(interactions):
    tables = Embeddings(torch.ones(1, 1), torch.arange(3.0)[:, None])
    found = evaluate(tables, interactions([[]], 3), interactions([[0]], 3), (2, 10)).compute()
    assert found["recall@2"] == 0.0
    assert found["recall@10"] == 1.0
    assert found["precision@10"] == pytest.approx(0.1)
    assert found["ndcg@10"] == pytest.approx(0.5)


def test_nobody_to_evaluate(interactions, problem):
    tables, train, _ = problem
    metrics = evaluate(tables, train, interactions([[]] * N_USERS, N_ITEMS))
    assert metrics.n_users == 0
    assert metrics.compute() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("table", [0, 1])
def test_non_finite_embeddings_are_refused(problem, refuses, value, table):
    tables, train, held_out = problem
    tables[table][5, 2] = value
    refuses(TrainingError, lambda: evaluate(tables, train, held_out), "NaN or infinite")


def test_the_embeddings_are_left_alone(problem):
    tables, train, held_out = problem
    before = [table.clone() for table in tables]
    evaluate(tables, train, held_out)
    assert all(torch.equal(a, b) for a, b in zip(before, tables, strict=True))


def test_a_share_of_nobody_has_sums(interactions):
    table = Embeddings(torch.tensor([[1.0, 2.0, 3.0]]), torch.eye(3))
    found = evaluate(table, interactions([[0]], 3), interactions([[1]], 3), (1, 2), (1, 2))
    assert found.n_users == 0
    assert found.sums["recall@2"] == found.sums["ndcg@1"] == 0.0
