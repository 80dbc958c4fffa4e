"""What the server makes of several workers' parameters and means."""

import numpy as np
import pytest

from server.reweighting import Reweighting, average_weights, merged_mean


def test_means_are_over_the_samples_of_all_workers():
    assert merged_mean("a", [{"a": 1.0}, {"a": 4.0}], [2, 1]) == 2.0


def test_a_worker_counts_for_what_its_teacher_was_asked_about():
    """One whose samples all lack the modality has a mean of nothing, which must not pull that of the others towards 0."""
    reports = [
        {"effect/a": 2.0, "weight/a": 0.5, "effect/b": 1.0, "weight/b": 1.5, "asked/effect/a": 0.5, "asked/weight/a": 0.5},
        {"effect/a": 1e-8, "weight/a": 0.0, "effect/b": 4.0, "weight/b": 1.0, "asked/effect/a": 0.0, "asked/weight/a": 0.0},
        {"effect/a": 5.0, "weight/a": 0.8, "effect/b": 1.0, "weight/b": 1.2, "asked/effect/a": 1.0, "asked/weight/a": 1.0},
    ]
    reweighting = Reweighting(("a", "b"))
    merged = reweighting.merge(1, reports, [64, 64, 32])
    assert merged == pytest.approx(
        {
            "effect/a": 3.5, "effect/b": 2.2, "weight/a": 0.65, "weight/b": (1.5 * 64 + 64 + 1.2 * 32) / 160,
            "effect_share/a": 3.5 / 5.7, "effect_share/b": 2.2 / 5.7,
        }
    )  # fmt: skip
    assert reweighting.rounds[1].effects == pytest.approx({"a": 3.5, "b": 2.2})


def test_a_modality_that_nobody_was_asked_about():
    assert merged_mean("weight/a", [{"weight/a": 0.0, "asked/weight/a": 0.0}] * 2, [3, 1]) == 0.0


def test_parameters_are_averaged_by_samples():
    ones, fives = {"w": np.ones((2, 3), dtype=np.float32)}, {"w": np.full((2, 3), 5, dtype=np.float32)}
    averaged = average_weights([ones, fives], [3, 1])
    assert averaged["w"].dtype == np.float32
    np.testing.assert_array_equal(averaged["w"], 2)
    assert average_weights([ones], [3])["w"] is ones["w"]
