"""Rows of large tables that Adam moves only when they are read, against moving all of them in every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckd_fed.backbones import gather
from ckd_fed.config import resolve
from ckd_fed.data.locate import open_dataset
from ckd_fed.kernels import kernels
from ckd_fed.training import behind
from ckd_fed.training.adam import Adam
from ckd_fed.training.build import build_trainer
from ckd_fed.training.drift import BETAS, EPS, FROM_STEP, Drift

RATE = 5e-4


def one_by_one(m: float, v: np.ndarray, step: int, steps: int) -> np.ndarray:
    """Where steps without a gradient bring a parameter that was 0, in float64."""
    p = np.zeros_like(v)
    for t in range(step + 1, step + steps + 1):
        m, v = BETAS[0] * m, BETAS[1] * v
        p -= RATE / (1 - BETAS[0] ** t) * m / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
    return p


@pytest.mark.parametrize(("step", "bound"), [(FROM_STEP, 1e-6), (300, 2e-8), (999, 2e-10), (1000, 2e-7), (50_000, 5e-8)])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 159, 160, 161, 1000])
def test_all_missed_steps_at_once_are_what_they_are_one_by_one(step, bound, steps):
    v = np.logspace(-26, -2, 49)  # from far below the square of Adam's epsilon to far above
    parameter, exp_avg, exp_avg_sq = (torch.from_numpy(x.copy())[None] for x in (np.zeros(49), np.full(49, 1e-4), v))
    drift = Drift(RATE, step)
    for _ in range(steps):
        drift.advance()
    drift.apply(parameter, exp_avg, exp_avg_sq, torch.tensor([step]))
    expected = one_by_one(1e-4, v, step, steps)
    assert np.abs(parameter[0].numpy() / expected - 1).max() < bound + (1e-7 if steps > 160 else 0)
    assert np.allclose(exp_avg[0], 1e-4 * BETAS[0] ** steps, rtol=1e-12, atol=0)
    assert np.allclose(exp_avg_sq[0], v * BETAS[1] ** steps, rtol=1e-12, atol=0)


def test_too_early_steps_cannot_be_made_up_for():
    with pytest.raises(ValueError, match="from 100 on, not from 99"):
        Drift(RATE, 99)


class Table(nn.Module):
    """A table of which a step reads some rows, and a weight that every step uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = nn.Parameter(torch.randn(400, 3, generator=generator, dtype=torch.float64).to(dtype))
        self.weight = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64).to(dtype))

    def loss(self, index: Tensor) -> Tensor:
        read, _ = gather.gather_rows(self.rows, gather.Index(index))
        return (read * self.weight - 1).square().sum(1).sqrt().mean() * 1e-4


def batches(n: int) -> list[Tensor]:
    """Half of each from a tenth of the rows, some of the others not for hundreds of steps, with repetitions."""
    generator = torch.Generator().manual_seed(1)
    return [torch.cat([torch.randint(0, high, (6,), generator=generator) for high in (40, 400)]) for _ in range(n)]


def trained(dtype: torch.dtype, steps: list[Tensor], *, rows: bool, settle_every: int = 0) -> tuple[Table, Adam]:
    module = Table(dtype)
    optimizer = Adam(module, RATE, ["rows"] if rows else [])
    for number, index in enumerate(steps):
        optimizer.catch_up({"rows": index.unique()})
        optimizer.zero_grad()
        module.loss(index).backward()
        assert module.rows.grad is not None
        assert module.rows.grad.is_sparse  # or nothing here is tested
        optimizer.step()
        assert optimizer.behind == ({"rows"} if rows and number >= FROM_STEP else set())
        if settle_every and number % settle_every == 0:
            optimizer.settle()
    optimizer.settle()
    return module, optimizer


@pytest.fixture
def sparse(monkeypatch):
    monkeypatch.setattr(gather, "SPARSE_FROM", 0)


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def with_and_without_kernels(request, monkeypatch):
    """Of float32; tables of float64 are moved by torch's operations either way."""
    if not request.param:
        monkeypatch.setattr(behind, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip("this machine compiles no kernels")


@pytest.mark.skipif(kernels() is None, reason="this machine compiles no kernels")
@pytest.mark.parametrize("step", [FROM_STEP, 2000], ids=["6 nodes", "4 nodes"])
@pytest.mark.parametrize("width", [1, 7, 64, 100])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_the_kernel_moves_rows_as_torchs_operations_do(step, width, some):
    generator = torch.Generator().manual_seed(2)
    n = 500
    given = [
        torch.randn(n, width, generator=generator),
        1e-3 * torch.randn(n, width, generator=generator),
        torch.rand(n, width, generator=generator) ** 9,
    ]
    drift = Drift(RATE, step)
    for _ in range(300):  # more than the 256 that there is room for at first
        drift.advance()
    last = step + torch.randint(0, 301, (n,), generator=generator)
    rows = torch.arange(0, n, 3) if some else torch.arange(n)
    expected, before, seen = [table.clone() for table in given], torch.get_num_threads(), []
    moved = [table[rows] for table in expected]
    drift.apply(moved[0], moved[1], moved[2], last[rows])
    for table, of_rows in zip(expected, moved, strict=True):
        table[rows] = of_rows
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found, when = [table.clone() for table in given], last.clone()
            drift.apply_compiled(kernels(), (found[0], found[1], found[2]), when, rows if some else None)
            assert torch.equal(when, last.scatter(0, rows, drift.step))
            seen.append(found)
    finally:
        torch.set_num_threads(before)
    for found in seen:
        assert all(map(torch.equal, found, seen[0]))
    for table, wanted, near in zip(seen[0], expected, (1e-6, 0, 0), strict=True):
        torch.testing.assert_close(table, wanted, rtol=1e-6, atol=near)
    changes = [table - was for table, was in zip(seen[0], given, strict=True)]
    torch.testing.assert_close(changes[0], expected[0] - given[0], rtol=1e-3, atol=1e-6)
    assert changes[0].abs().max() > 1e-3


@pytest.mark.skipif(kernels() is None, reason="this machine compiles no kernels")
@pytest.mark.parametrize("width", [3, 64, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_moved_to_the_bits_of_a_table_of_them(width, threads):
    generator, before = torch.Generator().manual_seed(3), torch.get_num_threads()
    parameter, exp_avg, exp_avg_sq = (torch.rand(400, width, generator=generator) for _ in range(3))
    rows = torch.randperm(400, generator=generator)[:130].sort().values
    gradient = torch.randn(130, width, generator=generator)
    found, expected = ([table.clone() for table in (parameter, exp_avg, exp_avg_sq)] for _ in range(2))
    laid_out = [table[rows] for table in expected]
    try:
        torch.set_num_threads(threads)
        kernels().adam(found[0], gradient, (found[1], found[2]), 7, RATE, BETAS, EPS, rows)
        kernels().adam(laid_out[0], gradient, (laid_out[1], laid_out[2]), 7, RATE, BETAS, EPS)
    finally:
        torch.set_num_threads(before)
    for table, of_rows, was in zip(expected, laid_out, (parameter, exp_avg, exp_avg_sq), strict=True):
        table[rows] = of_rows
        assert not torch.equal(table, was)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("settle_every", [0, 37])
def test_a_table_moved_row_by_row_is_the_one_moved_whole(sparse, settle_every):
    steps = batches(700)
    whole, all_of_it = trained(torch.float64, steps, rows=False)
    by_rows, optimizer = trained(torch.float64, steps, rows=True, settle_every=settle_every)
    assert (whole.rows - by_rows.rows).abs().max() < 1e-8  # they move by .3
    assert (whole.weight - by_rows.weight).abs().max() < 1e-8
    moved, started = whole.rows.detach(), Table(torch.float64).rows.detach()
    assert (moved - started).abs().median() > 1e-2
    for key in ("rows/step", "rows/exp_avg", "rows/exp_avg_sq"):
        assert torch.allclose(all_of_it.state()[key], optimizer.state()[key], rtol=1e-6, atol=1e-16), key


def test_in_float32_it_is_as_near_to_float64_as_the_whole_table_is(sparse, with_and_without_kernels):
    steps = batches(700)
    exact, _ = trained(torch.float64, steps, rows=False)
    off = {rows: (trained(torch.float32, steps, rows=rows)[0].rows - exact.rows).abs().mean() for rows in (False, True)}
    assert off[True] < 1.5 * off[False] < 1e-4


def test_rows_that_were_behind_when_they_were_read_are_refused(sparse, with_and_without_kernels):
    module = Table(torch.float32)
    optimizer = Adam(module, RATE, ["rows"])
    for number, index in enumerate(batches(FROM_STEP + 2)):
        optimizer.zero_grad()
        module.loss(index).backward()
        if number <= FROM_STEP:
            optimizer.step()
    before = module.rows.detach().clone()
    with pytest.raises(RuntimeError, match="rows of rows were read while behind"):
        optimizer.step()
    assert torch.equal(module.rows, before)


@pytest.mark.parametrize("row", [-1, 400])
def test_rows_beyond_the_table_are_refused(sparse, with_and_without_kernels, row):
    module = Table(torch.float32)
    optimizer = Adam(module, RATE, ["rows"])
    for index in batches(FROM_STEP + 1):
        optimizer.zero_grad()
        module.loss(index).backward()
        optimizer.step()
    with pytest.raises(IndexError):
        optimizer.catch_up({"rows": torch.tensor([row, 7]).sort().values})


def test_rows_that_were_caught_up_for_nothing(sparse, with_and_without_kernels):
    """Nothing was done with them; the next step is of others."""
    steps = batches(FROM_STEP + 60)
    plain, optimizer = trained(torch.float32, steps, rows=True)
    other = Table(torch.float32)
    by = Adam(other, RATE, ["rows"])
    for number, index in enumerate(steps):
        if number % 2:
            by.catch_up({"rows": torch.arange(0, 400, 5)})
        by.catch_up({"rows": index.unique()})
        by.zero_grad()
        other.loss(index).backward()
        by.step()
    by.settle()
    torch.testing.assert_close(other.rows, plain.rows, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(by.state()["rows/exp_avg"], optimizer.state()["rows/exp_avg"], rtol=1e-5, atol=1e-12)


def test_a_state_is_of_the_last_step_and_training_goes_on_from_it(sparse, with_and_without_kernels):
    steps = batches(300)
    module, optimizer = trained(torch.float32, steps[:200], rows=True)
    other = Table(torch.float32)
    other.load_state_dict(module.state_dict())
    resumed = Adam(other, RATE, ["rows"])
    resumed.load_state(optimizer.state())
    for trained_on, by in ((module, optimizer), (other, resumed)):
        for index in steps[200:]:
            by.catch_up({"rows": index.unique()})
            by.zero_grad()
            trained_on.loss(index).backward()
            by.step()
        by.settle()
    assert torch.equal(module.rows, other.rows)
    assert all(torch.equal(value, resumed.state()[key]) for key, value in optimizer.state().items())


@pytest.mark.parametrize(
    "overrides",
    [{}, {"distillation.enabled": False}, {"distillation.enabled": False, "balancing.method": "gradient-modulation", "balancing.noise": False}],
    ids=["distilled", "plain", "gradient modulation"],
)
def test_vbpr_trains_the_same_row_by_row(overrides, monkeypatch):
    """In float64 here, where nothing but the way of moving tables differs."""
    config = resolve({"data.standin": "always", "training.batch-size": 8, "distillation.batch-size": 8, "backbone": "vbpr", **overrides}, {})
    dataset, distilled = open_dataset(config), config.distillation.enabled
    tables: dict[bool, dict[str, Tensor]] = {}
    for rows in (False, True):
        monkeypatch.setattr(gather, "SPARSE_FROM", 0 if rows else 1 << 62)
        trainer = build_trainer(config, dataset, "student", distilled=distilled)
        trainer.backbone.double()
        steps = [trainer.stream.step(0, number) for number in range(FROM_STEP + 150)]
        width = steps[0].ranking.shape[1] + steps[0].distillation.shape[1]
        sheets = {m: np.random.default_rng(3).normal(size=(len(steps), width)) for m in dataset.modalities} if distilled else None
        seen: list[frozenset[str]] = []
        step = trainer.optimizer.step
        monkeypatch.setattr(trainer.optimizer, "step", lambda step=step, seen=seen, trainer=trainer: (step(), seen.append(trainer.optimizer.behind)))
        for start in (0, 120):  # two epochs
            part = {m: sheet[start : start + 120] for m, sheet in sheets.items()} if sheets else None
            trainer.train_epoch(0, part, steps[start : start + 120])
        balanced = config.balancing.method != "none"
        users = {"user_embedding"} if balanced else {"user_embedding", *(f"preference.{m}" for m in dataset.modalities)}
        assert (users <= max(seen, key=len)) == rows
        assert not trainer.optimizer.behind
        tables[rows] = trainer.snapshot()
    for name, table in tables[False].items():
        assert (table - tables[True][name]).abs().max() < 1e-7, name
