"""Causal effects and weights, against values computed by hand."""

import pytest
import torch

from ckd_fed.distillation.effects import causal_effects, modality_weights


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_effects_by_hand():
    image, text = causal_effects(
        tensor(3.0, 1.0, -2.0),
        tensor([1.0, 1.5, -1.0], [2.5, 0.0, -3.0]),
        tensor([4.0, 1.0, -0.5], [1.0, 2.0, 4.0]),
    )
    assert image.tolist() == [0.5, 1e-8, 2.0]  # 2/4, -0.5/1 clamped, -1/-0.5
    assert text.tolist() == [0.5, 0.5, 0.25]


def test_effects_are_clamped():
    (found,) = causal_effects(tensor(100.0, 1e-20, 1.0), tensor([0.0, 0.0, 2.0]), tensor([1.0, 1.0, 1.0]))
    assert found.tolist() == [10.0, 1e-8, 1e-8]


def test_a_zero_denominator_is_no_effect():
    (found,) = causal_effects(tensor(1.0, 0.0, -1.0), tensor([0.0, 0.0, 0.0]), tensor([0.0, 0.0, -0.0]))
    assert found.tolist() == [1e-8] * 3


def test_effects_of_three_modalities_are_independent():
    found = causal_effects(tensor(2.0), tensor([1.0], [1.5], [2.5]), tensor([0.5], [0.5], [0.5]))
    assert found.flatten().tolist() == [2.0, 1.0, 1e-8]


def test_weights_by_hand():
    assert modality_weights(tensor([1.0], [3.0])).flatten().tolist() == [1.5, 0.5]
    assert modality_weights(tensor([1.0], [2.0], [3.0])).flatten().tolist() == pytest.approx([1.25, 1.0, 0.75], rel=1e-15)
    assert modality_weights(tensor([1.0], [1.0], [2.0], [4.0])).flatten().tolist() == pytest.approx([7 / 6, 7 / 6, 1.0, 2 / 3], rel=1e-15)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_weights_sum_to_the_number_of_modalities(n):
    generator = torch.Generator().manual_seed(n)
    effects = 10 ** (torch.rand(n, 1000, generator=generator, dtype=torch.float64) * 9 - 8)
    weights = modality_weights(effects)
    torch.testing.assert_close(weights.sum(0), torch.full((1000,), float(n), dtype=torch.float64))
    assert (weights >= 0).all()
    assert (effects.argmin(0) == weights.argmax(0)).all(), "the weakest modality gets the largest weight"


def test_two_modalities_reduce_to_the_published_form():
    generator = torch.Generator().manual_seed(0)
    a, b = effects = 10 * torch.rand(2, 1000, generator=generator, dtype=torch.float64) + 1e-8
    torch.testing.assert_close(modality_weights(effects), torch.stack([2 * b / (a + b), 2 * a / (a + b)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-8, 10.0])
def test_equal_extreme_effects_weigh_one(dtype, value):
    weights = modality_weights(torch.full((3, 3), value, dtype=dtype))
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_weights_are_those_of_the_modalities_that_were_asked():
    asked = torch.tensor([[True, True, False, False], [True, False, False, True], [True, True, False, False]])
    weights = modality_weights(tensor([1.0] * 4, [2.0] * 4, [3.0] * 4), asked)
    assert weights.T.tolist() == [pytest.approx([1.25, 1.0, 0.75]), [1.5, 0, 0.5], [0, 0, 0], [0, 1, 0]]


def test_no_gradient_flows():
    margin = tensor(1.0).requires_grad_()
    effects = causal_effects(margin, torch.stack([margin * 0.5, margin * 0.25]), torch.stack([margin * 2, margin * 3]))
    assert not effects.requires_grad
    assert not modality_weights(effects).requires_grad


def test_one_modality_has_no_weights():
    with pytest.raises(ValueError, match="at least two modalities, got 1"):
        modality_weights(tensor([1.0]))
