"""Metrics against a plain loop over users."""

import math

import numpy as np
import pytest

from ckd_fed.evaluation.metrics import NAMES, RankingMetrics, metric_keys


def dcg(hits):
    return sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))


def naive(hits, n_relevant, k):
    """One user's metrics; ``hits`` is the list of the largest K."""
    top = hits[:k]
    retrieved = dcg(sorted(hits, reverse=True)[:k])
    return {
        f"recall@{k}": sum(top) / n_relevant,
        f"precision@{k}": sum(top) / k,
        f"hit_rate@{k}": float(any(top)),
        f"ndcg@{k}": dcg(top) / dcg([1] * min(k, n_relevant)),
        f"ndcg_retrieved@{k}": dcg(top) / retrieved if retrieved else 0.0,
    }


@pytest.mark.parametrize("ks", [(1,), (10, 20), (3, 5, 20)])
def test_against_a_loop(ks):
    rng = np.random.default_rng(0)
    hits = rng.random((300, max(ks))) < rng.random((300, 1)) ** 2
    n_relevant = np.maximum(1, hits.sum(1) + rng.integers(0, 15, 300))
    metrics = RankingMetrics(ks)
    for block in np.array_split(np.arange(300), 7):
        metrics.update(hits[block], n_relevant[block])
    rows = [{key: value for k in ks for key, value in naive(h.tolist(), int(n), k).items()} for h, n in zip(hits, n_relevant, strict=True)]
    found = metrics.compute()
    assert metrics.n_users == 300
    assert set(found) == set(metric_keys(ks)) == set(rows[0])
    for key, value in found.items():
        assert value == pytest.approx(np.mean([row[key] for row in rows]), rel=1e-12), key


def test_the_two_ndcg_differ_as_documented():
    """One hit at rank 1 of five relevant items: 1 by retrieved hits, less by the standard."""
    metrics = RankingMetrics((2,))
    metrics.update(np.array([[True, False]]), np.array([5]))
    found = metrics.compute()
    assert found["ndcg_retrieved@2"] == 1.0
    assert found["ndcg@2"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert (found["recall@2"], found["precision@2"], found["hit_rate@2"]) == (0.2, 0.5, 1.0)


def test_retrieved_hits_are_those_of_the_largest_k():
    """The published code sorts the whole list before cutting it at k: a hit at rank 3 makes the ideal of k = 1 one hit."""
    metrics = RankingMetrics((1, 3))
    metrics.update(np.array([[False, False, True]]), np.array([1]))
    found = metrics.compute()
    assert found["ndcg_retrieved@1"] == 0.0
    assert found["ndcg_retrieved@3"] == pytest.approx(0.5)
    metrics = RankingMetrics((1, 3))
    metrics.update(np.array([[True, False, True]]), np.array([2]))
    assert metrics.compute()["ndcg_retrieved@1"] == 1.0


def test_merging_equals_one_pass():
    rng = np.random.default_rng(1)
    hits, n_relevant = rng.random((50, 20)) < 0.2, rng.integers(20, 30, 50)
    whole, parts = RankingMetrics(), [RankingMetrics() for _ in range(3)]
    whole.update(hits, n_relevant)
    for part, block in zip(parts, np.array_split(np.arange(50), 3), strict=True):
        part.update(hits[block], n_relevant[block])
    merged = RankingMetrics()
    for part in parts:
        merged.merge(part.sums, part.n_users)
    assert merged.n_users == 50
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_nothing_counted():
    assert RankingMetrics().compute() == {}
    assert metric_keys((10, 20)) == tuple(f"{name}@{k}" for k in (10, 20) for name in NAMES)
