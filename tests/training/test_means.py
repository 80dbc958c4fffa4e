"""Means over steps, put together from parts."""

import pytest
import torch

from ckd_fed.distillation.effects import LOWEST
from ckd_fed.training.means import Means, Numbers


def test_means_count_each_step_by_its_weight():
    """Over however many parts: the means of the parts themselves could not be put together again."""
    names, all_of_it, half, none = ["loss/total", "effect/text"], torch.ones(2), torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0])
    first, second, whole = Means(), Means(), Means()
    assert whole.compute() == whole.asked() == {}
    first.update(Numbers(names, torch.tensor([1.0, 0.8]), half))
    first.update(Numbers(names, torch.tensor([2.0, 0.2]), all_of_it))
    second.update(Numbers(names, torch.tensor([6.0, LOWEST]), none))
    whole.merge(first)
    whole.merge(second)
    assert second.compute() == {"loss/total": 6.0, "effect/text": LOWEST}
    assert whole.compute() == pytest.approx({"loss/total": 3.0, "effect/text": (0.8 * 0.5 + 0.2) / 1.5})
    assert whole.asked() == pytest.approx({"asked/loss/total": 1.0, "asked/effect/text": 0.5})
    assert first.compute()["effect/text"] == whole.compute()["effect/text"]  # what was merged stays as it was
    unweighted = Means()
    unweighted.update(Numbers(["a"], torch.tensor([1.0])))
    unweighted.update(Numbers(["a"], torch.tensor([4.0])))
    assert (unweighted.compute(), unweighted.asked()) == ({"a": 2.5}, {})
