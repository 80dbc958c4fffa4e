"""The optimiser against torch's own."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from ckd_fed.kernels import Kernels, kernels
from ckd_fed.training.adam import Adam


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Embedding(4, 3))


def backward(module: nn.Module, number: int) -> None:
    """Gradients of all but the embedding, and from the third step on of that too."""
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(number))
    out = module[1](module[0](x)).square().sum()  # type: ignore[index]
    (out + module[2].weight.square().sum() if number >= 2 else out).backward()  # type: ignore[index]


def test_every_step_is_torchs_own_bit_by_bit(module):
    other = copy.deepcopy(module)
    ours, theirs = Adam(module, 3e-2), torch.optim.Adam(other.parameters(), lr=3e-2, fused=True)
    for number in range(6):
        backward(module, number)
        backward(other, number)
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
        assert all(p.grad is None for p in module.parameters())
        for (name, mine), reference in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, reference), (number, name)
    for (name, _), reference in zip(module.named_parameters(), other.parameters(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state()[f"{name}/{key}"], theirs.state[reference][key]), (name, key)


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_tables_are_moved_by_our_own_kernel_to_the_same_bits(monkeypatch, threads):
    """Of vectors alone: the last numbers of a thread's part are rounded otherwise by torch."""
    calls, compiled, before = [], Kernels.adam, torch.get_num_threads()
    monkeypatch.setattr(Kernels, "adam", lambda *args: (calls.append(args[1].shape), compiled(*args)))
    module = nn.ParameterList([torch.randn(2053, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2)])
    other = copy.deepcopy(module)
    ours = Adam(module, 3e-2, rates={"1": 1e-3})
    theirs = [torch.optim.Adam([p], lr=rate, fused=True) for p, rate in zip(other, (3e-2, 1e-3), strict=True)]
    try:
        torch.set_num_threads(threads)
        for number in range(20):
            generator = torch.Generator().manual_seed(number)
            for mine, reference in zip(module, other, strict=True):
                gradient = torch.randn(2053, 64, generator=generator) * 10.0 ** torch.randint(-30, 2, (2053, 1), generator=generator)
                mine.grad, reference.grad = gradient * (torch.rand(2053, 1, generator=generator) < 0.3), None
                reference.grad = mine.grad.clone()
            ours.step()
            for optimizer in theirs:
                optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert calls == [(2053, 64)] * 40
    assert all(map(torch.equal, module, other))
    for name, reference, optimizer in zip(("0", "1"), other, theirs, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state()[f"{name}/{key}"], optimizer.state[reference][key]), (name, key)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_large_table_of_any_length_and_place_is_moved_as_torch_does(start):
    n = 2**17 + 1003
    given = torch.randn(n + start, generator=torch.Generator().manual_seed(2))
    module, other = nn.ParameterList([given.clone()[start:]]), nn.ParameterList([given.clone()[start:]])
    ours, theirs = Adam(module, 3e-2), torch.optim.Adam(other.parameters(), lr=3e-2, fused=True)
    for number in range(5):
        module[0].grad = torch.randn(n, generator=torch.Generator().manual_seed(number))
        other[0].grad = module[0].grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(module[0], other[0], rtol=1e-6, atol=1e-7)


def test_a_backward_pass_that_needs_a_moved_parameter_is_told():
    table = nn.Parameter(torch.rand(2053, 64))
    module = nn.ParameterList([table])
    loss = table.square().sum()
    table.grad = torch.ones_like(table)
    Adam(module, 1e-2).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("of", [lambda t: t.double(), lambda t: t.T.contiguous().T], ids=["float64", "not contiguous"])
def test_large_tables_that_are_not_for_the_kernel(of):
    module = nn.ParameterList([of(torch.randn(2053, 64, generator=torch.Generator().manual_seed(1)))])
    other = copy.deepcopy(module)
    ours, theirs = Adam(module, 3e-2), torch.optim.Adam(other.parameters(), lr=3e-2, fused=True)
    for mine, reference in zip(module, other, strict=True):
        mine.grad = reference.grad = torch.randn(2053, 64, generator=torch.Generator().manual_seed(2)).to(mine.dtype)
    ours.step()
    theirs.step()
    torch.testing.assert_close(module[0], other[0], rtol=1e-6, atol=1e-7)
    assert (module[0] != of(torch.randn(2053, 64, generator=torch.Generator().manual_seed(1)))).any()


def test_moving_large_parameters_within_backward_comes_to_the_same_bits(module, monkeypatch):
    monkeypatch.setattr("ckd_fed.training.adam._LARGE", 15)  # both matrices of weights
    other = copy.deepcopy(module)
    ours, theirs = Adam(module, 3e-2), Adam(other, 3e-2)
    for number in range(4):
        with ours.in_backward():
            backward(module, number)
        assert {name for name, p in module.named_parameters() if p.grad is not None} == {"0.bias", "1.bias", *(["2.weight"] if number >= 2 else [])}
        ours.step()
        ours.zero_grad()
        backward(other, number)
        theirs.step()
        theirs.zero_grad()
        for (name, mine), reference in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, reference), (number, name)
    assert all(torch.equal(tensor, theirs.state()[name]) for name, tensor in ours.state().items())
    backward(module, 0)  # outside of it gradients stay
    assert module[0].weight.grad is not None  # type: ignore[index]


def test_a_parameter_without_a_gradient_stays_and_has_no_state(module):
    optimizer, before = Adam(module, 1.0), module[2].weight.detach().clone()  # type: ignore[index]
    backward(module, 0)
    optimizer.step()
    assert torch.equal(module[2].weight, before)  # type: ignore[index]
    assert {name.split("/")[0] for name in optimizer.state()} == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_it_goes_on_from_its_state(module):
    other = copy.deepcopy(module)
    whole, part = Adam(module, 1e-2), Adam(other, 1e-2)
    for number in range(5):
        backward(module, number)
        backward(other, number)
        whole.step()
        part.step()
        whole.zero_grad()
        part.zero_grad()
        taken = part.state()
        part = Adam(other, 1e-2)
        part.load_state(taken)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_model_is_refused(module):
    optimizer = Adam(module, 1e-2)
    backward(module, 0)
    optimizer.step()
    state = optimizer.state()
    with pytest.raises(ValueError, match=r"0\.weight/exp_avg has shape \(2, 7\), the parameter has \(5, 7\)"):
        optimizer.load_state({**state, "0.weight/exp_avg": torch.zeros(2, 7)})
    with pytest.raises(KeyError, match=r"1\.bias/exp_avg_sq"):
        optimizer.load_state({key: value for key, value in state.items() if key != "1.bias/exp_avg_sq"})
    assert all(torch.equal(value, optimizer.state()[key]) for key, value in state.items())  # what was there is kept


def test_training_does_not_import_torchs_compiler():
    """It takes seconds and 70 MB, and in a deployment every message would pay for it."""
    program = (
        "import sys; from ckd_fed.config import resolve; "
        "from ckd_fed.data.locate import open_dataset; from ckd_fed.training.build import build_trainer; "
        "config = resolve({'data.standin': 'always'}, {}); trainer = build_trainer(config, open_dataset(config), 'student'); "
        "trainer.train_epoch(0, steps=[trainer.stream.step(0, 0)]); trainer.diagnose(trainer.dataset.val); "
        "print(sorted(name for name in sys.modules if name in ('torch._dynamo', 'torch._inductor', 'sympy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
