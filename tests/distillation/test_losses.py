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
