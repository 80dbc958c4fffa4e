"""Inverted indices: the places that name each row."""

import numpy as np
import pytest
import torch

from ckd_fed.backbones.inverted import Inverted, ascending, compacted, distinct


@pytest.mark.parametrize("high", [1, 7, 1 << 16, (1 << 16) + 1, 3_000_000, 1 << 32])
@pytest.mark.parametrize("k", [0, 1, 4000])
def test_places_ascend_and_equal_numbers_stay_as_they_come(high, k):
    numbers = np.random.default_rng(0).integers(0, high, k)
    numbers[k // 2 :] = numbers[: k - k // 2]  # repetitions
    assert np.array_equal(ascending(numbers), np.argsort(numbers, kind="stable"))


@pytest.mark.parametrize("numbers", [[], [4], [4, 0, 4, 70_000, 0, 9]])
def test_distinct(numbers):
    index = torch.tensor(numbers, dtype=torch.int64)
    assert torch.equal(distinct(index), index.unique())


def test_bags_of_all_rows_and_of_those_that_are_named():
    index = torch.tensor([5, 2, 5, 0])
    every, named = Inverted(index, 7), Inverted(index)
    assert every.rows is None
    assert named.rows.tolist() == [0, 2, 5]
    source = torch.tensor([[1.0], [2], [4], [8]])
    assert every.sums(source).flatten().tolist() == [8, 0, 2, 0, 0, 5, 0]
    assert named.sums(source).flatten().tolist() == [8, 2, 5]


def test_sums_of_other_rows_with_factors():
    index = torch.tensor([1, 0, 1])
    inverted = Inverted(index, 2)
    assert inverted.places.tolist() == [1, 0, 2]
    found = inverted.sums(torch.tensor([[1.0, 10], [2, 20]]), at=torch.tensor([0, 1, 1]), factors=torch.tensor([3.0, -1, 0.5]))
    assert found.tolist() == [[3, 30], [-1, -10]]


def test_without_places_all_bags_are_empty():
    assert Inverted(torch.empty(0, dtype=torch.int64), 3).sums(torch.empty(0, 2)).tolist() == [[0, 0]] * 3
    assert Inverted(torch.empty(0, dtype=torch.int64)).sums(torch.empty(0, 2)).shape == (0, 2)


def test_compacted_indices_are_positions_among_the_distinct_ones():
    rows, (one, two) = compacted([torch.tensor([7, 2, 7]), torch.tensor([[0, 2], [8, 0]])])
    assert rows.tolist() == [0, 2, 7, 8]
    assert one.tolist() == [2, 1, 2]
    assert two.tolist() == [[0, 1], [3, 0]]


def test_compacted_equals_what_torch_finds():
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(90_000, shape, generator=generator) for shape in ((4000,), (2, 300), (0,))]
    rows, positions = compacted(indices)
    expected, inverse = torch.cat([index.reshape(-1) for index in indices]).unique(return_inverse=True)
    assert torch.equal(rows, expected)
    assert torch.equal(torch.cat([part.reshape(-1) for part in positions]), inverse)
    assert [part.shape for part in positions] == [index.shape for index in indices]
