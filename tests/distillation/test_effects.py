"""Causal effects and weights, against values computed by hand."""

import pytest
import torch

from ckd_fed.distillation.effects import causal_effects, modality_weights


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_effects_by_hand():
    found = causal_effects(
        tensor(3.0, 1.0, -2.0),
        {"image": tensor(1.0, 1.5, -1.0), "text": tensor(2.5, 0.0, -3.0)},
        {"image": tensor(4.0, 1.0, -0.5), "text": tensor(1.0, 2.0, 4.0)},
    )
    assert found["image"].tolist() == [0.5, 1e-8, 2.0]  # 2/4, -0.5/1 clamped, -1/-0.5
    assert found["text"].tolist() == [0.5, 0.5, 0.25]


def test_effects_are_clamped():
    found = causal_effects(tensor(100.0, 1e-20, 1.0), {"a": tensor(0.0, 0.0, 2.0)}, {"a": tensor(1.0, 1.0, 1.0)})
    assert found["a"].tolist() == [10.0, 1e-8, 1e-8]


def test_a_zero_denominator_is_no_effect():
    found = causal_effects(tensor(1.0, 0.0, -1.0), {"a": tensor(0.0, 0.0, 0.0)}, {"a": tensor(0.0, 0.0, -0.0)})
    assert found["a"].tolist() == [1e-8] * 3


def test_effects_of_three_modalities_are_independent():
    joint = tensor(2.0)
    found = causal_effects(joint, {m: tensor(x) for m, x in zip("abc", (1.0, 1.5, 2.5), strict=True)}, {m: tensor(0.5) for m in "abc"})
    assert {m: c.item() for m, c in found.items()} == {"a": 2.0, "b": 1.0, "c": 1e-8}


def test_weights_by_hand():
    two = modality_weights({"a": tensor(1.0), "b": tensor(3.0)})
    assert (two["a"].item(), two["b"].item()) == (1.5, 0.5)
    three = modality_weights({"a": tensor(1.0), "b": tensor(2.0), "c": tensor(3.0)})
    assert [three[m].item() for m in "abc"] == pytest.approx([1.25, 1.0, 0.75], rel=1e-15)
    four = modality_weights({m: tensor(c) for m, c in zip("abcd", (1.0, 1.0, 2.0, 4.0), strict=True)})
    assert [four[m].item() for m in "abcd"] == pytest.approx([7 / 6, 7 / 6, 1.0, 2 / 3], rel=1e-15)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_weights_sum_to_the_number_of_modalities(n):
    generator = torch.Generator().manual_seed(n)
    effects = {str(m): 10 ** (torch.rand(1000, generator=generator, dtype=torch.float64) * 9 - 8) for m in range(n)}
    weights = modality_weights(effects)
    total = sum(weights.values())
    torch.testing.assert_close(total, torch.full_like(total, n))
    stacked_effects, stacked_weights = torch.stack(list(effects.values())), torch.stack(list(weights.values()))
    assert (stacked_weights >= 0).all()
    assert (stacked_effects.argmin(0) == stacked_weights.argmax(0)).all(), "the weakest modality gets the largest weight"


def test_two_modalities_reduce_to_the_published_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (10 * torch.rand(1000, generator=generator, dtype=torch.float64) + 1e-8 for _ in range(2))
    weights = modality_weights({"a": a, "b": b})
    torch.testing.assert_close(weights["a"], 2 * b / (a + b))
    torch.testing.assert_close(weights["b"], 2 * a / (a + b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-8, 10.0])
def test_equal_extreme_effects_weigh_one(dtype, value):
    weights = modality_weights({m: torch.full((3,), value, dtype=dtype) for m in "abc"})
    for weight in weights.values():
        torch.testing.assert_close(weight, torch.ones_like(weight))


def test_no_gradient_flows():
    margin = tensor(1.0).requires_grad_()
    effects = causal_effects(margin, {"a": margin * 0.5, "b": margin * 0.25}, {"a": margin * 2, "b": margin * 3})
    weights = modality_weights(effects)
    assert not any(x.requires_grad for x in (*effects.values(), *weights.values()))


def test_one_modality_has_no_weights():
    with pytest.raises(ValueError, match="at least two modalities"):
        modality_weights({"a": tensor(1.0)})
