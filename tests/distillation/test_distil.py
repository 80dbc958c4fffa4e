"""The compiled distillation loss against the same of torch's operations."""

from dataclasses import replace

import pytest
import torch

from ckd_fed.distillation import distil
from ckd_fed.distillation.distil import DistillationLoss, DistillationTerms, StudentMargins, TeacherMargins
from ckd_fed.kernels import Kernels, kernels

B, K = 600, 1300  # neither a multiple of the 256 that a thread takes at a time
LOSS = DistillationLoss(rho=0.3, kappa=2.0, temperature=0.5)
PARTS = ("margin", "specific", "generic", "effect", "weight")

pytestmark = pytest.mark.skipif(kernels() is None, reason="this machine compiles no kernels")


def names(n):
    return tuple("abcd"[:n])


def given(n, *, asked=False, b=B, k=K, dtype=torch.float32):
    """What student and teachers of n modalities say. Some margins are 0, and some are the teacher's own."""
    generator = torch.Generator().manual_seed(0)

    def draw(size, scale=1.0):
        return scale * torch.randn(size, generator=generator).to(dtype)

    def mask(size):
        return torch.rand(size, generator=generator) < 0.6 if asked else None

    teachers = [TeacherMargins(draw(b), draw(k, 3.0), mask(b), mask(k)) for _ in range(n)]
    only = [draw(b) for _ in range(n)]
    for margin, teacher in zip(only, teachers, strict=True):
        margin[::7] = 0
        margin[1::7] = teacher.ranking[1::7]
    return StudentMargins(draw(b, 2.0), [draw(b) for _ in range(n)], only, [draw(k, 2.0) for _ in range(n)]), teachers


def computed(compute, student, teachers):
    """What a loss is made of, and its gradients by the margins of ``only m``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*student.only, *student.pairs)]
    n = len(teachers)
    found = compute(names(n), replace(student, only=leaves[:n], pairs=leaves[n:]), teachers)
    gradients = torch.autograd.grad(1.7 * found.loss, leaves, materialize_grads=True, allow_unused=True) if found.loss.requires_grad else []
    return found, gradients


@pytest.fixture
def counted(monkeypatch):
    """How often the kernel was called."""
    calls, original = [], Kernels.distil
    monkeypatch.setattr(Kernels, "distil", lambda *given: (calls.append(1), original(*given))[1])
    return calls


@pytest.mark.parametrize("asked", [False, True], ids=["all asked", "some asked"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("off", [(), ("reweight",), ("specific",), ("generic",), ("reweight", "generic")], ids="without {}".format)
def test_the_kernel_computes_what_is_composed(counted, n, asked, off):
    loss = replace(LOSS, **dict.fromkeys(off, False))
    student, teachers = given(n, asked=asked)
    found, gradients = computed(loss.distil, student, teachers)
    assert len(counted) == 1
    expected, wanted = computed(loss.composed, student, teachers)
    torch.testing.assert_close([found.loss, found.per_sample], [expected.loss, expected.per_sample], rtol=1e-5, atol=1e-6)
    for part in PARTS:
        torch.testing.assert_close(getattr(found.terms, part), getattr(expected.terms, part), rtol=1e-5, atol=2e-6, msg=part)
    for part in ("asked", "asked_pairs"):
        assert (getattr(found.terms, part) is None) == (not asked)
        assert not asked or torch.equal(getattr(found.terms, part), getattr(expected.terms, part))
    assert len(gradients) == 2 * n
    torch.testing.assert_close(list(gradients), list(wanted), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("asked", [False, True], ids=["all asked", "some asked"])
def test_the_same_bits_whatever_the_threads(asked):
    student, teachers = given(2, asked=asked)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found, gradients = computed(LOSS.distil, student, teachers)
            seen.append([found.loss, found.per_sample, *(getattr(found.terms, part) for part in PARTS), *gradients])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_margins_that_are_not_contiguous():
    student, teachers = given(2, asked=True)

    def spread(tensor):
        return None if tensor is None else torch.stack([tensor, tensor], dim=1)[:, 0]

    apart = StudentMargins(spread(student.joint), *([spread(tensor) for tensor in of] for of in (student.without, student.only, student.pairs)))
    found = LOSS.distil(names(2), apart, [TeacherMargins(*map(spread, vars(one).values())) for one in teachers])
    assert not apart.joint.is_contiguous()
    assert torch.equal(found.loss, LOSS.distil(names(2), student, teachers).loss)


@pytest.mark.parametrize("place", ["joint", "only", "pairs"])
def test_what_is_not_finite_is_not_lost(place):
    """The trainer looks for it in the epoch's means."""
    student, teachers = given(2)
    tensor = student.joint if place == "joint" else getattr(student, place)[1]
    tensor[5] = float("nan")
    found = LOSS.distil(names(2), student, teachers)
    assert torch.isnan(found.loss)
    assert torch.isnan(LOSS.composed(names(2), student, teachers).loss)


def test_one_mask_of_two():
    """A modality that all items have beside one that some lack."""
    student, (first, second) = given(2, asked=True)
    teachers = [TeacherMargins(first.ranking, first.distillation), second]
    found, gradients = computed(LOSS.distil, student, teachers)
    expected, wanted = computed(LOSS.composed, student, teachers)
    assert isinstance(found.terms, DistillationTerms)
    assert found.terms.asked[0].all()
    assert torch.equal(found.terms.asked[1], second.asked_ranking)
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(gradients), list(wanted), rtol=1e-4, atol=1e-9)


def test_a_teacher_that_was_asked_about_no_pair():
    student, (first, second) = given(2)
    teachers = [first, replace(second, asked_distillation=torch.zeros(K, dtype=torch.bool))]
    found, gradients = computed(LOSS.distil, student, teachers)
    assert found.terms.generic[1] == 0
    assert not gradients[3].any()
    assert gradients[2].any()


@pytest.mark.parametrize(("b", "k", "dtype"), [(5, 7, torch.float64), (5, 0, torch.float32)], ids=["float64", "no pairs"])
def test_margins_that_the_kernel_is_not_for(counted, b, k, dtype):
    student, teachers = given(2, b=b, k=k, dtype=dtype)
    found, expected = LOSS.distil(names(2), student, teachers), LOSS.composed(names(2), student, teachers)
    assert not counted
    assert found.loss.dtype == dtype
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0, equal_nan=True)


def test_without_kernels(monkeypatch):
    student, teachers = given(3)
    compiled = LOSS.distil(names(3), student, teachers)
    monkeypatch.setattr(distil, "kernels", lambda: None)
    composed = LOSS.distil(names(3), student, teachers)
    torch.testing.assert_close(compiled.loss, composed.loss)


@pytest.mark.parametrize("of", ["ranking", "distillation", "asked_ranking", "asked_distillation"])
def test_teachers_that_say_too_little(of):
    """The kernel would read beyond it."""
    student, teachers = given(2, asked=True)
    teachers[1] = replace(teachers[1], **{of: getattr(teachers[1], of)[:-1]})
    for compute in (LOSS.distil, LOSS.composed):
        with pytest.raises((ValueError, RuntimeError), match=r"shapes|size"):
            compute(names(2), student, teachers)
