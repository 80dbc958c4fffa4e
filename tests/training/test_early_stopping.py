"""Early stopping as published."""

import math

import pytest

from ckd_fed.training.early_stopping import EarlyStopping


def test_published_patience_stops_at_the_eleventh_validation_without_gain():
    stopping = EarlyStopping(10)
    assert stopping.update(0.5, 5)
    for n in range(1, 11):
        assert not stopping.update(0.4, 5 + 5 * n)
        assert not stopping.stop, n
    assert not stopping.update(0.4, 60)
    assert stopping.stop
    assert (stopping.best, stopping.best_epoch, stopping.waited) == (0.5, 5, 11)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_patience_is_what_is_tolerated(patience):
    stopping = EarlyStopping(patience)
    stopping.update(1.0, 1)
    for n in range(patience):
        stopping.update(0.0, 2 + n)
        assert not stopping.stop
    stopping.update(0.0, 99)
    assert stopping.stop


def test_an_equal_value_is_no_gain():
    stopping = EarlyStopping(10)
    assert stopping.update(0.5, 1)
    assert not stopping.update(0.5, 2)
    assert (stopping.best_epoch, stopping.waited) == (1, 1)


def test_a_gain_starts_the_count_anew():
    stopping = EarlyStopping(1)
    assert [stopping.update(value, epoch) for epoch, value in enumerate([0.1, 0.1, 0.2, 0.0, 0.3])] == [True, False, True, False, True]
    assert (stopping.best, stopping.best_epoch, stopping.waited, stopping.stop) == (0.3, 4, 0, False)


def test_zero_is_a_gain_over_nothing_and_nan_never_is():
    stopping = EarlyStopping(10)
    assert stopping.best == -math.inf
    assert not stopping.update(math.nan, 1)
    assert stopping.update(0.0, 2)
    assert not stopping.update(math.nan, 3)
    assert stopping.best == 0.0
