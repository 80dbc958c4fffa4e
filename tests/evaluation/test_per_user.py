"""User by user and group by group: the means are the metrics, and small cases come out as counted by hand."""

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.evaluation.groups import group_rows
from ckd_fed.evaluation.per_user import rank_users
from ckd_fed.evaluation.ranking import evaluate


def scores_as_embeddings(scores):
    """Embeddings whose inner products are a score matrix."""
    return Embeddings(torch.tensor(scores, dtype=torch.float64), torch.eye(len(scores[0]), dtype=torch.float64))


@pytest.mark.parametrize("n_items", [15, 60])  # fewer and more items than the longest cut-off
def test_means_over_users_are_the_metrics(n_items, random_interactions):
    train = random_interactions(40, n_items, seed=1)
    held_out = random_interactions(40, n_items, low=0, seed=2)
    rng = np.random.default_rng(3)
    embeddings = Embeddings(torch.from_numpy(rng.normal(size=(40, 8))), torch.from_numpy(rng.normal(size=(n_items, 8))))
    rankings = rank_users(embeddings, train, held_out, 20)
    expected = evaluate(embeddings, train, held_out, (10, 20)).compute()
    found = rankings.metrics((10, 20))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].mean() == pytest.approx(value, abs=1e-6)
    assert rankings.means((20, 10)).compute() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(rankings.users, held_out.users)


def test_training_items_are_in_no_list(random_interactions):
    train = random_interactions(10, 30, seed=1)
    rankings = rank_users(
        scores_as_embeddings(np.random.default_rng(0).normal(size=(10, 30)).tolist()), train, random_interactions(10, 30, seed=2), 20
    )
    assert not train.contains(rankings.users[:, None], rankings.top).any()


def test_groups_counted_by_hand(interactions):
    """Three users with 1, 2 and 3 training items; with k = 1 users 0 and 2 find their only held-out item, user 1 does not."""
    train = interactions([[0], [0, 1], [0, 1, 2]], 6)
    held_out = interactions([[1], [2], [3]], 6)
    scores = [[0, 9, 0, 0, 0, 0], [0, 0, 1, 0, 0, 9], [0, 0, 0, 9, 0, 0]]
    rows = group_rows("student", rank_users(scores_as_embeddings(scores), train, held_out, 1), train, held_out, k=1)
    users = {row["group"]: (row["n"], row["recall@1"]) for row in rows if row["kind"] == "users"}
    assert users == {"1 items": (1, 1.0), "2 items": (1, 0.0), "3 items": (1, 1.0)}
    items = {row["group"]: (row["n"], row["recall@1"]) for row in rows if row["kind"] == "items"}  # items 1, 2, 3: 2, 1, 0 training users
    assert items == {"0 users": (1, 1.0), "1 users": (1, 0.0), "2 users": (1, 1.0)}


def test_equal_counts_stay_in_one_group_and_all_are_counted(random_interactions, interactions):
    same = interactions([[0], [1], [2], [3]], 8)
    held_out = interactions([[4], [5], [6], [7]], 8)
    rows = group_rows("m", rank_users(scores_as_embeddings(np.eye(4, 8).tolist()), same, held_out, 2), same, held_out, k=2)
    assert [(row["kind"], row["n"]) for row in rows] == [("users", 4), ("items", 4)]

    train, test = random_interactions(50, 40, seed=1), random_interactions(50, 40, low=0, seed=2)
    rows = group_rows("m", rank_users(scores_as_embeddings(np.random.default_rng(0).normal(size=(50, 40)).tolist()), train, test, 20), train, test)
    assert sum(row["n"] for row in rows if row["kind"] == "users") == len(test.users)
    assert sum(row["n"] for row in rows if row["kind"] == "items") == len(test)


@pytest.mark.parametrize(("k", "expected"), [(2, 0.5), (3, 1.0)])
def test_groups_count_the_first_k_alone(k, expected, interactions):
    train, held_out = interactions([[0]], 5), interactions([[2, 3]], 5)
    rankings = rank_users(scores_as_embeddings([[9, 8, 7, 6, 5]]), train, held_out, 3)  # 1, 2, 3
    found = {row["kind"]: (row["n"], row[f"recall@{k}"]) for row in group_rows("m", rankings, train, held_out, k=k)}
    assert found == {"users": (1, expected), "items": (2, expected)}


def test_groups_are_thirds(interactions):
    train, held_out = interactions([list(range(n)) for n in range(1, 10)], 12), interactions([[11]] * 9, 12)
    rows = group_rows("m", rank_users(scores_as_embeddings(np.ones((9, 12)).tolist()), train, held_out, 3), train, held_out, k=3)
    users = [(row["group"], row["n"]) for row in rows if row["kind"] == "users"]
    assert users == [("1 to 3 items", 3), ("4 to 6 items", 3), ("7 to 9 items", 3)]


def test_all_held_out_items_count_also_beyond_k(interactions):
    found = rank_users(scores_as_embeddings([[9, 8, 7, 6, 5]]), interactions([[0]], 5), interactions([[1, 2, 3]], 5), 2)
    assert found.n_relevant.tolist() == [3]
    assert found.metrics((2,))["recall@2"].tolist() == pytest.approx([2 / 3])
