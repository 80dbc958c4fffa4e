"""A sweep's table, from what its runs recorded."""

from pathlib import Path

import pytest

from ckd_fed.analysis.history import RunHistory
from ckd_fed.experiments.recipe import Job, Recipe
from ckd_fed.experiments.summary import summarise


def test_gains_are_means_over_the_seeds_that_have_a_base():
    recalls = {
        ("a", 1): 0.1, ("a", 2): 0.2, ("a", 3): 0.4, ("a", 4): 0.0,
        ("b", 1): 0.2, ("b", 2): 0.2, ("b", 3): 0.2, ("b", 4): 0.3, ("b", 5): 9.0,
    }  # fmt: skip
    found = {}
    for (variant, seed), value in recalls.items():
        final = {"event": "final", "final/student/test/recall@20": value, "final/student/test/ndcg@20": value / 2}
        row = {"event": "round", "phase": "distillation", "round": 1, "val/recall@20": value / 4}
        found[Job(f"{variant}{seed}", "d", "vbpr", seed, variant, {})] = RunHistory(Path(), {}, [row, final])
    first, second = summarise(Recipe("r", "R", {"a": {}, "b": {}}), found)
    assert first.gain is None
    assert second.gain == pytest.approx((1.0 + 0.0 - 0.5) / 3)
    assert second.values["val recall@20"] == pytest.approx([0.05, 0.05, 0.05, 0.075, 2.25])
