"""The two distillation losses, against values computed by hand."""

import math

import pytest
import torch

from ckd_fed.distillation.losses import generic_loss, specific_loss


def tensor(*values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def test_specific_loss():
    found = specific_loss(tensor(1.0, 2.0, -1.0, -3.0, 0.5), tensor(0.25, 3.0, -1.0, -4.5, -0.5))
    assert found.tolist() == [0.75, 0.0, 0.0, 1.5, 1.0]


def test_specific_loss_pulls_only_where_the_student_is_behind():
    student = tensor(0.0, 2.0, requires_grad=True)
    specific_loss(tensor(1.0, 1.0), student).sum().backward()
    assert student.grad.tolist() == [-1.0, 0.0]


def test_generic_loss_of_undecided_parties_is_log_2():
    assert generic_loss(tensor(0.0), tensor(0.0), 0.1).item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5])
def test_generic_loss(temperature):
    teacher, student = [0.3, -0.2, 0.0, 1.0], [0.1, 0.15, -0.4, 0.9]
    expected = 0.0
    for a, b in zip(teacher, student, strict=True):
        p, q = 1 / (1 + math.exp(-a / temperature)), 1 / (1 + math.exp(-b / temperature))
        expected += (-p * math.log(q + 1e-8) - (1 - p) * math.log(1 - q + 1e-8)) / 4
    assert generic_loss(tensor(*teacher), tensor(*student), temperature).item() == pytest.approx(expected, rel=1e-13)


def test_generic_loss_is_least_where_the_student_agrees():
    student = tensor(0.3, -0.2, requires_grad=True)
    generic_loss(tensor(0.3, -0.2), student, 0.1).backward()
    assert student.grad.abs().max() < 1e-6
    assert generic_loss(tensor(0.3), tensor(0.31), 0.1) > generic_loss(tensor(0.3), tensor(0.3), 0.1) < generic_loss(tensor(0.3), tensor(0.29), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generic_loss_survives_any_margin(dtype):
    """A student entirely sure of the wrong order costs log(1e8), not infinity."""
    student = torch.tensor([1e4, -1e4, 30.0, -5.0], dtype=dtype, requires_grad=True)
    loss = generic_loss(torch.tensor([-1e4, 1e4, -30.0, 5.0], dtype=dtype), student, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=0.02)
    assert torch.isfinite(student.grad).all()


def test_generic_loss_of_several_modalities_is_each_ones_own():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    asked = torch.rand(3, 8, generator=generator) < 0.5
    asked[2] = False
    found = generic_loss(teacher, student, 0.5, asked)
    for n in (0, 1):
        assert found[n].item() == pytest.approx(generic_loss(teacher[n][asked[n]], student[n][asked[n]], 0.5).item(), rel=1e-13)
    assert found[2] == 0


@pytest.mark.parametrize("some", [False, True])
def test_generic_loss_has_its_own_derivative(some):
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 2, 6, dtype=torch.float64, generator=generator)
    asked = torch.rand(2, 6, generator=generator) < 0.5 if some else None
    assert torch.autograd.gradcheck(lambda margin: generic_loss(teacher, margin, 0.3, asked), (student.requires_grad_(),))
