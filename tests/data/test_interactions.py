"""Interactions and the reading of split files."""

import json
import warnings

import numpy as np
import pytest

from ckd_fed.data.interactions import Interactions, read_split_file
from ckd_fed.errors import DataError


@pytest.fixture
def split_file(tmp_path):
    """Write a split file's text or bytes."""

    def write(content):
        path = tmp_path / "train.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_rows_are_sorted_and_complete():
    found = Interactions.from_pairs(np.array([2, 0, 2, 0]), np.array([1, 3, 0, 2]), n_users=4, n_items=5)
    assert found.indptr.tolist() == [0, 2, 2, 4, 4]
    assert found.items.tolist() == [2, 3, 0, 1]
    assert (found.n_users, found.n_items, len(found)) == (4, 5, 4)
    assert found.degree.tolist() == [2, 0, 2, 0]
    assert found.users.tolist() == [0, 2]
    assert found.row.tolist() == [0, 0, 2, 2]


def test_contains_agrees_with_sets(random_interactions):
    some = random_interactions(15, 20, low=0, high=8)
    pairs = set(zip(some.row.tolist(), some.items.tolist(), strict=True))
    found = some.contains(np.arange(15)[:, None], np.arange(20)[None])
    assert found.tolist() == [[(u, i) in pairs for i in range(20)] for u in range(15)]


def test_contains_of_nothing(interactions):
    assert not interactions([[], []], 3).contains(np.array([0, 1]), np.array([0, 2])).any()


def test_reading(split_file):
    users, items = read_split_file(split_file('{"1": [4, 0], "0": [2], "5": []}'))
    assert sorted(zip(users.tolist(), items.tolist(), strict=True)) == [(0, 2), (1, 0), (1, 4)]


def test_a_byte_order_mark_is_no_fault(split_file):
    assert read_split_file(split_file(b"\xef\xbb\xbf" + b'{"0": [1]}'))[1].tolist() == [1]


def test_missing_file(tmp_path, refuses):
    refuses(DataError, lambda: read_split_file(tmp_path / "val.json"), tmp_path / "val.json", "does not exist")


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("", ["damaged"]),
        ('{"0": [1, 2', ["damaged", "line 1"]),
        ('{"0": [1]} {"1": [2]}', ["damaged"]),
        ("[" * 100_000, ["damaged"]),
        (b'{"0": [1], "\xff\xfe": [2]}', ["damaged", "0xff"]),
        ("[1, 2]", ["list"]),
        ("3", ["int"]),
        ("null", ["NoneType"]),
        ("{}", ["empty"]),
        ('{"0": [], "1": []}', ["empty"]),
        ('{"-1": [2]}', ["'-1'"]),
        ('{"1.0": [2]}', ["'1.0'"]),
        ('{"": [2]}', ["''"]),
        ('{"x\\ny": [2]}', ["'x\\ny'"]),
        ('{"²": [2]}', ["²"]),
        ('{"0": [1], "3": ["2"]}', ["user 3", "'2'"]),
        ('{"0": [1], "3": [2.0]}', ["user 3", "2.0"]),
        ('{"0": [1], "3": [true]}', ["user 3", "True"]),
        ('{"0": [1], "3": [null]}', ["user 3", "None"]),
        ('{"0": [1], "3": [[2]]}', ["user 3", "[[2]]"]),
        ('{"0": [1], "3": [NaN]}', ["user 3", "nan"]),
        ('{"0": [1], "3": 2}', ["user 3", "2"]),
        ('{"0": [1], "3": {"2": 1}}', ["user 3"]),
        ('{"0": [1], "3": "a\\nb"}', ["user 3"]),
        ('{"0": [1, -7]}', ["-7", "out of range"]),
        ('{"0": [99999999999999999999]}', ["99999999999999999999", "out of range"]),
        ('{"99999999999999999999": [0]}', ["99999999999999999999", "out of range"]),
        ('{"4": [1], "4": [2]}', ["user 4", "twice"]),
        ('{"4": [1], "04": [2]}', ["user", "4"]),
        ('{"a\\nb": [], "a\\nb": []}', ["twice"]),
        ('{"0": [5], "6": [3, 4, 3]}', ["user 6", "item 3", "twice"]),
        (f'{{"0": [{"9" * 5000}]}}', []),
        (f'{{"{"9" * 5000}": [0]}}', []),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, str | bytes) else "",
)
def test_bad_content_is_one_line_naming_the_file_and_the_value(split_file, refuses, content, mentions):
    path = split_file(content)
    message = refuses(DataError, lambda: read_split_file(path), path, *mentions)
    message.encode()
    assert len(message) < 1000


def test_a_lone_surrogate_can_still_be_printed(split_file, refuses):
    path = split_file('{"0": "\\ud800"}')
    refuses(DataError, lambda: read_split_file(path), "user 0").encode()


def test_many_users_without_items_are_no_fault(split_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        users, _ = read_split_file(split_file(json.dumps({**{str(u): [] for u in range(100)}, "7": [1]})))
    assert users.tolist() == [7]


def test_a_sample_of_users_keeps_all_of_their_items_and_is_the_same_for_the_same_seed(random_interactions):
    interactions = random_interactions(30, 20)
    n = len(interactions.users) // 2
    sample = interactions.of_sampled_users(n, 1)
    assert len(sample.users) == n
    assert set(sample.users) < set(interactions.users)
    assert all(sample.degree[user] == interactions.degree[user] for user in sample.users)
    assert interactions.contains(sample.row, sample.items).all()
    assert (sample.n_users, sample.n_items) == (interactions.n_users, interactions.n_items)
    assert np.array_equal(sample.users, interactions.of_sampled_users(n, 1).users)
    assert not np.array_equal(sample.users, interactions.of_sampled_users(n, 2).users)


@pytest.mark.parametrize("more", [0, 10**9])
def test_a_sample_of_no_fewer_users_is_all_of_them(random_interactions, more):
    interactions = random_interactions(30, 20)
    assert interactions.of_sampled_users(more, 1) is interactions


def test_one_interaction_makes_an_item_warm(interactions):
    assert interactions([[0], [0, 1]], 3).warm.tolist() == [True, True, False]


def test_users_without_items_are_never_sampled(interactions):
    few = interactions([[0] if user % 4 == 0 else [] for user in range(40)], 3)
    for seed in range(20):
        assert len(few.of_sampled_users(5, seed).users) == 5
