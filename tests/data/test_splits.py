"""Split rules: their counts and order, by hand and on sets like the published ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from ckd_fed.data.splits import RULE_WORDS, RULES, TEST, TRAIN, VAL, split
from ckd_fed.errors import DataError

REAL = Path(__file__).parents[2] / "../shared/data"


def problem(degrees, seed=0, n_items=60):
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(len(degrees)), degrees)
    items = np.concatenate([rng.choice(n_items, degree, replace=False) for degree in degrees])
    return users, items


def counts(users, part):
    return [[int(((users == user) & (part == k)).sum()) for k in (TRAIN, VAL, TEST)] for user in range(users.max() + 1)]


def test_random_takes_a_tenth_each_but_at_least_one():
    users, items = problem([1, 2, 3, 5, 9, 10, 19, 20, 33])
    part = split("random", users, items)
    assert counts(users, part) == [[1, 0, 0], [2, 0, 0], [1, 1, 1], [3, 1, 1], [7, 1, 1], [8, 1, 1], [17, 1, 1], [16, 2, 2], [27, 3, 3]]


@pytest.mark.parametrize("rule", RULES)
def test_a_split_is_a_function_of_the_set_of_interactions(rule):
    users, items = problem([5] * 40)
    times = np.random.default_rng(1).permutation(len(users)).astype(float)
    part = split(rule, users, items, times)
    order = np.random.default_rng(2).permutation(len(users))
    np.testing.assert_array_equal(split(rule, users[order], items[order], times[order]), part[order])
    assert set(part.tolist()) == {TRAIN, VAL, TEST}
    assert rule in RULE_WORDS


def test_the_seed_decides():
    users, items = problem([5] * 40)
    np.testing.assert_array_equal(split("random", users, items, seed=123), split("random", users, items))
    assert (split("random", users, items, seed=124) != split("random", users, items)).any()


def test_random_is_pinned():
    users, items = np.repeat([0, 1], 5), np.tile(np.arange(5), 2)
    assert split("random", users, items).tolist() == [0, 0, 2, 1, 0, 2, 0, 0, 0, 1]


def test_every_position_is_held_out_equally_often():
    users, items = np.repeat(np.arange(4000), 5), np.tile(np.arange(5), 4000)
    part = split("random", users, items)
    for k in (VAL, TEST):
        share = np.bincount(items[part == k], minlength=5) / 4000
        assert abs(share - 0.2).max() < 0.025  # four standard deviations


def test_leave_one_out_takes_the_last_in_time():
    users, items = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([3, 1, 2, 0, 1, 2, 5])
    times = np.array([4.0, 1.0, 9.0, 2.0, 1.0, 2.0, 0.0])
    assert split("leave-one-out", users, items, times).tolist() == [VAL, TRAIN, TEST, TRAIN, TRAIN, TRAIN, TRAIN]


@pytest.mark.parametrize("rule", ["leave-one-out", "temporal"])
def test_what_goes_by_time_needs_times(rule, refuses):
    refuses(DataError, lambda: split(rule, *problem([5] * 40)), rule, "needs the times", "random")


def test_temporal_cuts_in_time_and_never_within_a_moment(refuses):
    users, items = problem([5] * 40)
    times = np.random.default_rng(1).integers(0, 50, len(users)).astype(float)
    part = split("temporal", users, items, times)
    assert times[part == TRAIN].max() < times[part == VAL].min()
    assert times[part == VAL].max() < times[part == TEST].min()
    assert (part == TRAIN).mean() == pytest.approx(0.8, abs=0.05)
    refuses(DataError, lambda: split("temporal", users, items, np.zeros(len(users))), "same time")


def test_cold_items_are_never_trained(refuses):
    users, items = problem([12] * 50)
    part = split("cold-items", users, items)
    held = [set(items[part == k].tolist()) for k in (TRAIN, VAL, TEST)]
    assert [len(one) for one in held] == [48, 6, 6]
    assert not held[0] & held[1]
    assert not held[0] & held[2]
    assert not held[1] & held[2]
    refuses(DataError, lambda: split("cold-items", np.zeros(9, dtype=int), np.arange(9)), "9 items are too few")


def test_warm_and_cold_holds_out_items_and_splits_the_rest():
    users, items = problem([12] * 50)
    part = split("warm-and-cold", users, items)
    trained = np.isin(items, items[part == TRAIN])
    for k in (VAL, TEST):
        assert len(set(items[(part == k) & ~trained].tolist())) == 6  # cold items
        warm = np.bincount(users[(part == k) & trained], minlength=50)
        assert warm.tolist() == [1] * 50  # of 7 to 12 warm ones a tenth, at least one
    assert not set(items[(part == VAL) & ~trained]) & set(items[(part == TEST) & ~trained])


def test_an_unknown_rule(refuses):
    refuses(DataError, lambda: split("loo", *problem([5])), "'loo'", "leave-one-out")


def test_the_rule_on_the_real_interactions_has_the_published_sizes():
    """All 160,792 interactions of Baby, split again: as many in every part, and per user, as in the set itself."""
    if not (REAL / "baby").is_dir():
        pytest.skip(f"{REAL / 'baby'} is not there")
    tables = [json.loads((REAL / "baby" / f"{name}.json").read_text()) for name in ("train", "val", "test")]
    rows = [(int(user), item, k) for k, table in enumerate(tables) for user, row in table.items() for item in row]
    users, items, real = np.array(rows).T
    part = split("random", users, items)
    assert np.bincount(part).tolist() == np.bincount(real).tolist() == [119_674, 20_559, 20_559]
    for k in (VAL, TEST):
        np.testing.assert_array_equal(np.bincount(users[part == k]), np.bincount(users[real == k]))
    assert (part == real).mean() < 0.9  # other draws, though


def test_temporal_shares_are_exact():
    n = np.arange(100)
    assert split("temporal", 0 * n, n, n.astype(float)).tolist() == [TRAIN] * 80 + [VAL] * 10 + [TEST] * 10


def test_cold_items_go_by_the_seed_and_are_those_of_warm_and_cold():
    keys = np.unique(np.random.default_rng(0).integers(0, 2000, 900))
    users, items = keys // 50, keys % 50
    cold, both = (split(rule, users, items, seed=1) for rule in ("cold-items", "warm-and-cold"))
    held = np.isin(items, np.unique(items[cold != TRAIN]))
    assert 0 < held.mean() < 1
    np.testing.assert_array_equal(cold[held], both[held])
    assert (cold != split("cold-items", users, items, seed=2)).any()
    np.testing.assert_array_equal(both[~held], split("random", users[~held], items[~held], seed=1))
