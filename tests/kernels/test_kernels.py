"""The compiled kernels: what they compute, where they are kept, and doing without them."""

import shutil
import sys

import pytest
import torch

from ckd_fed.backbones import block_margins as block_margins_module
from ckd_fed.backbones import gather as gather_module
from ckd_fed.backbones import inverted as inverted_module
from ckd_fed.backbones import projection as projection_module
from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.block_margins import block_margins, composed_margins, summed, triple_margins
from ckd_fed.backbones.gather import Gather
from ckd_fed.backbones.inverted import Inverted, distinct
from ckd_fed.backbones.projection import project, project_rows
from ckd_fed.distillation import distil as distil_module
from ckd_fed.kernels import Kernels, build, kernels

N_USERS, N_ITEMS, B, K = 300, 200, 150, 700
WIDTHS = [1, 7, 8, 20, 64, 80, 150]  # below, at and beside the kernels' 8 lanes and tiles of 64

needs_bfloat16 = pytest.mark.skipif(kernels() is None or not kernels().bfloat16, reason="this processor does not multiply bfloat16")
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_bfloat16, id="bfloat16")

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def without_kernels(monkeypatch):
    """A machine without a C compiler, from the call on."""

    def take_away():
        for module in (block_margins_module, distil_module, inverted_module, projection_module):
            monkeypatch.setattr(module, "kernels", lambda: None)

    return take_away


@pytest.fixture
def gathers(generator):
    """Both batches, or the ranking batch alone: some users and items come often, some never."""

    def draw(k=K):
        users = torch.randint(N_USERS // 2, (B + k,), generator=generator).square() // (N_USERS // 2)
        triples = [users, *torch.randint(N_ITEMS - 9, (2, B + k), generator=generator)]
        return Gather(Triples(*(part[:B] for part in triples)), Triples(*(part[B:] for part in triples)) if k else None)

    return draw


@pytest.fixture
def tables(generator):
    """The users' and items' tables of a width."""
    return lambda width: [torch.randn(n, width, generator=generator) for n in (N_USERS, N_ITEMS)]


def values_and_gradients(compute, tables, gather, dtype):
    """All in float64; the loss weighs each value differently."""
    tables = [table.to(dtype).requires_grad_() for table in tables]
    parts = [part for part in compute(*tables, gather.users, gather.items) if part is not None]
    loss = sum((part * torch.linspace(-1, 2, part.numel(), dtype=dtype).view(part.shape)).sum() for part in parts)
    return [x.to_dense().double() for x in (*parts, *torch.autograd.grad(loss, tables))]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [0, K], ids=["plain", "distilled"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_margins_and_gradients_of_a_block(tables, gathers, monkeypatch, width, k, sparse):
    if sparse:
        monkeypatch.setattr(gather_module, "SPARSE_FROM", 0)
        monkeypatch.setattr(gather_module, "SPARSE_ROWS", 0)
    given, gather = tables(width), gathers(k)
    found = values_and_gradients(block_margins, given, gather, torch.float32)
    assert len(found) == (5 if k else 4)
    torch.testing.assert_close(found, values_and_gradients(composed_margins, given, gather, torch.float64), rtol=1e-5, atol=1e-4)


def test_any_number_of_threads_gives_the_same_bits(tables, gathers, monkeypatch):
    given, gather, threads = tables(64), gathers(), torch.get_num_threads()
    compiled = kernels()
    try:
        found = []
        for n, team in ((1, compiled._team), (2, compiled._team), (3, compiled._team), (2, (None, None))):
            torch.set_num_threads(n)
            monkeypatch.setattr(compiled, "_team", team)
            found.append(values_and_gradients(block_margins, given, gather, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_tables_that_are_not_contiguous(tables, gathers):
    given, gather = [table.T.contiguous().T for table in tables(20)], gathers()
    assert not given[0].is_contiguous()
    expected = values_and_gradients(composed_margins, given, gather, torch.float64)
    torch.testing.assert_close(values_and_gradients(block_margins, given, gather, torch.float32), expected, rtol=1e-5, atol=1e-4)


def test_margins_of_triples_with_and_without_kernels(tables, gathers, without_kernels):
    (users, items), gather = tables(64), gathers()
    triples = gather.users.rows, *(torch.randint(N_ITEMS, (2, B + K)))
    found = triple_margins(users, items, *triples)
    user, first, second = (table[rows] for table, rows in zip((users, items, items), triples, strict=True))
    torch.testing.assert_close(found, (user * (first - second)).sum(-1), rtol=1e-5, atol=1e-4)
    without_kernels()
    torch.testing.assert_close(triple_margins(users, items, *triples), found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("row", [-1, 200, 2**40])
def test_a_row_beyond_its_table_is_refused(tables, row):
    users, items = tables(16)
    user, first, second = torch.zeros(3, 2, dtype=torch.int64)
    first[1] = row
    with pytest.raises(IndexError, match=f"{row}.* 200"):
        triple_margins(users, items, user, first, second)
    gather = Gather(Triples(user, first, second), None)
    with pytest.raises(IndexError, match=f"{row}.* 200"):
        block_margins(users, items, gather.users, gather.items)


@pytest.mark.parametrize("k", [0, 1, 4000])
def test_an_inverted_index_with_and_without_kernels(generator, without_kernels, k):
    index = torch.randint(500, (k,), generator=generator)
    compiled = Inverted(index, 501)
    without_kernels()
    expected = Inverted(index, 501)
    assert torch.equal(compiled.places, expected.places)
    assert torch.equal(compiled.bags, expected.bags)
    assert torch.equal(compiled.starts, expected.starts)


@pytest.mark.parametrize("k", [0, 1, 300])
def test_distinct_numbers_of_an_index(generator, without_kernels, k):
    index = torch.randint(200, (k,), generator=generator)
    assert torch.equal(distinct(index, 201), index.unique())
    without_kernels()
    assert torch.equal(distinct(index, 201), index.unique())


def test_distinct_numbers_are_below_their_bound():
    with pytest.raises(IndexError, match=r"200.* 200"):
        distinct(torch.tensor([3, 200]), 200)


def rows_of(n, share, generator):
    return torch.arange(n) if share == 1 else torch.nonzero(torch.rand(n, generator=generator) < share).view(-1)


@pytest.mark.parametrize("share", [0, 0.6, 1])
@pytest.mark.parametrize(("n", "inner", "d"), [(1, 16, 16), (7, 32, 80), (63, 48, 64), (1000, 128, 64), (2300, 80, 144)])
def test_a_linear_layer_and_its_gradient(generator, n, inner, d, share):
    inputs, weight, bias, of_outputs = (torch.randn(shape, generator=generator) for shape in ((n, inner), (d, inner), (d,), (n, d)))
    rows = rows_of(n, share, generator)
    outputs = kernels().linear(inputs, weight, bias, rows)
    assert outputs.shape == (n, d)
    torch.testing.assert_close(outputs[rows].double(), inputs[rows].double() @ weight.double().T + bias, rtol=1e-5, atol=1e-5 * inner**0.5)
    of_outputs[torch.ones(n, dtype=torch.bool).scatter(0, rows, False)] = torch.nan  # of other rows nothing is read
    of_weight, of_bias = kernels().linear_gradient(inputs, of_outputs, rows)
    torch.testing.assert_close(of_weight.double(), of_outputs[rows].double().T @ inputs[rows].double(), rtol=1e-5, atol=1e-5 * n**0.5)
    torch.testing.assert_close(of_bias.double(), of_outputs[rows].double().sum(0), rtol=1e-5, atol=1e-5 * n**0.5)
    packed = kernels().linear(inputs, weight, bias, rows, packed=True)
    assert torch.equal(packed, outputs[rows])
    assert all(map(torch.equal, (of_weight, of_bias), kernels().linear_gradient(inputs, of_outputs[rows], rows, packed=True)))


@pytest.mark.parametrize("dtype", [BFLOAT16])
@pytest.mark.parametrize(("n", "inner", "d"), [(1, 16, 16), (64, 128, 64), (501, 48, 80), (33, 512, 512), (200, 64, 48)])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_linear_layer_of_features_in_bfloat16(generator, n, inner, d, share, dtype):
    """The other factor is rounded too, and nothing else: not the bias, its gradient or the result."""
    inputs, weight, bias, of_outputs = (torch.randn(shape, generator=generator) for shape in ((n, inner), (d, inner), (d,), (n, d)))
    inputs, rows = inputs.to(dtype), rows_of(n, share, generator)

    def exact(tensor):
        return tensor.to(dtype).double()

    outputs = kernels().linear(inputs, weight, bias, rows)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs[rows].double(), exact(inputs[rows]) @ exact(weight).T + bias, rtol=1e-5, atol=1e-5 * inner**0.5)
    assert torch.equal(kernels().linear(inputs, weight, bias, rows, packed=True), outputs[rows])
    of_outputs[torch.ones(n, dtype=torch.bool).scatter(0, rows, False)] = torch.nan  # of other rows nothing is read
    of_weight, of_bias = kernels().linear_gradient(inputs, of_outputs, rows)
    torch.testing.assert_close(of_weight.double(), exact(of_outputs[rows]).T @ exact(inputs[rows]), rtol=1e-5, atol=1e-5 * n**0.5)
    torch.testing.assert_close(of_bias.double(), of_outputs[rows].double().sum(0), rtol=1e-5, atol=1e-5 * n**0.5)
    assert all(map(torch.equal, (of_weight, of_bias), kernels().linear_gradient(inputs, of_outputs[rows], rows, packed=True)))


@pytest.mark.parametrize("dtype", [BFLOAT16])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_projected_features_in_bfloat16(generator, monkeypatch, some, dtype):
    """With the kernel and without, which rounds the results as well."""
    features, linear = torch.randn(70, 48, generator=generator).to(dtype), torch.nn.Linear(48, 32)
    rows = torch.tensor([69, 3, 0, 3, 41])
    calls, forward = [], Kernels.linear
    monkeypatch.setattr(Kernels, "linear", lambda *args, **named: (calls.append(1), forward(*args, **named))[1])

    def found():
        read = project_rows(features, rows, linear) if some else project(features, linear)
        return read, torch.autograd.grad((read * torch.linspace(-1, 1, read.numel()).view(read.shape)).sum(), list(linear.parameters()))

    compiled = found()
    assert len(calls) == 1
    monkeypatch.setattr(projection_module, "kernels", lambda: None)
    torch.testing.assert_close(compiled, found(), rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("shape", [(48, 32), (40, 32), (48, 24)], ids=["compiled", "inner", "outer"])
def test_projected_rows_with_and_without_kernels(generator, monkeypatch, shape):
    """As they come, some several times."""
    inner, d = shape
    features, linear = torch.randn(70, inner, generator=generator), torch.nn.Linear(inner, d)
    rows = torch.tensor([69, 3, 0, 3, 41, 42, 3, 69, 1, 8])
    calls, forward = [], Kernels.linear
    monkeypatch.setattr(Kernels, "linear", lambda *args, **named: (calls.append(1), forward(*args, **named))[1])

    def found():
        read = project_rows(features, rows, linear)
        return read, torch.autograd.grad((read * torch.linspace(-1, 1, read.numel()).view(read.shape)).sum(), list(linear.parameters()))

    compiled = found()
    assert len(calls) == (shape == (48, 32))
    for row in (-1, 70):
        with pytest.raises(IndexError):
            project_rows(features, torch.tensor([5, row]), linear)
    calls.clear()
    monkeypatch.setattr(projection_module, "kernels", lambda: None)
    torch.testing.assert_close(compiled, found(), rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_a_linear_layer_has_the_same_bits_with_any_number_of_threads(generator, monkeypatch, dtype):
    inputs, weight, bias, of_outputs = (torch.randn(shape, generator=generator) for shape in ((900, 128), (64, 128), (64,), (900, 64)))
    inputs = inputs.to(dtype)
    rows, compiled, threads, found = rows_of(900, 0.8, generator), kernels(), torch.get_num_threads(), []
    try:
        for n, team in ((1, compiled._team), (2, compiled._team), (3, compiled._team), (2, (None, None))):
            torch.set_num_threads(n)
            monkeypatch.setattr(compiled, "_team", team)
            found.append([compiled.linear(inputs, weight, bias, rows)[rows], *compiled.linear_gradient(inputs, of_outputs, rows)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("shape", [(70, 48, 32), (70, 40, 32), (70, 48, 24), (2, 35, 48, 32)], ids=["compiled", "inner", "outer", "three dimensions"])
def test_a_projection_with_and_without_kernels(generator, monkeypatch, shape):
    *n, inner, d = shape
    features, linear = torch.randn(*n, inner, generator=generator), torch.nn.Linear(inner, d)
    rows = torch.arange(0, 70, 3) if len(n) == 1 else None
    calls, forward = [], Kernels.linear
    monkeypatch.setattr(Kernels, "linear", lambda *args, **named: (calls.append(1), forward(*args, **named))[1])

    def found():
        outputs = project(features, linear, None if rows is None else lambda: rows)
        read = outputs if rows is None else outputs[rows]
        return read, torch.autograd.grad((read * torch.linspace(-1, 1, read.numel()).view(read.shape)).sum(), list(linear.parameters()))

    compiled = found()
    assert len(calls) == (shape == (70, 48, 32))
    monkeypatch.setattr(projection_module, "kernels", lambda: None)
    torch.testing.assert_close(compiled, found(), rtol=1e-5, atol=1e-5)
    assert len(calls) == (shape == (70, 48, 32))


def test_margins_of_views_are_sums_of_blocks(generator):
    margins = [torch.randn(9, dtype=torch.double, generator=generator, requires_grad=True) for _ in range(3)]
    views = [[0, 1, 2], [0, 2], [1]]
    found = summed(margins, views)
    for one, view in zip(found, views, strict=True):
        torch.testing.assert_close(one, sum(margins[block] for block in view))
    assert torch.autograd.gradcheck(lambda *blocks: summed(blocks, views), margins)
    assert summed(margins, []) == []


@pytest.fixture
def built_anew(monkeypatch, tmp_path):
    """Build for a home and with environment variables of the test's own; counts the compilations."""
    compiled = []
    compile_ = build._compile
    monkeypatch.setattr(build, "_compile", lambda command, to: (compiled.append(command), compile_(command, to)))
    monkeypatch.setattr(build, "_kept_in", [])
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path / "home"))

    def again(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return build.built.__wrapped__(), len(compiled)

    return again


def test_a_machine_compiles_once(built_anew, tmp_path):
    (library, found), times = built_anew()
    assert library is not None
    assert times == 1
    (kept,) = (tmp_path / "home" / "cache" / "kernels").iterdir()
    assert found == str(kept)
    (library, found), times = built_anew()
    assert (library is not None, found, times) == (True, str(kept), 1)


def test_it_is_kept_in_the_first_folder_that_is_named(built_anew, tmp_path):
    for name in ("one", "two"):
        build.keep_in(tmp_path / name)
    (_, found), _ = built_anew()
    assert found.startswith(str(tmp_path / "one"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("value", ["0", "off", "No", "FALSE"])
def test_kernels_can_be_switched_off(built_anew, value):
    (library, found), times = built_anew(CKD_FED_KERNELS=value)
    assert (library, times) == (None, 0)
    assert f"CKD_FED_KERNELS={value}" in found


def test_without_a_compiler(built_anew):
    (library, found), times = built_anew(CC="no-such-compiler -O")
    assert (library, found, times) == (None, "there is no C compiler 'no-such-compiler'", 0)


def test_a_compiler_that_fails(built_anew, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: no licence' >&2\necho more >&2\nexit 1\n")
    compiler.chmod(0o755)
    (library, found), _ = built_anew(CC=str(compiler))
    assert (library, found) == (None, "compiling failed: cc: no licence")
    assert not list((tmp_path / "home" / "cache" / "kernels").iterdir())


def test_a_compiler_that_does_not_know_this_processor(built_anew, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec {shutil.which("cc")} "$@"\n')
    compiler.chmod(0o755)
    (library, _), _ = built_anew(CC=str(compiler))
    assert library is not None


def test_a_home_that_cannot_be_written(built_anew, tmp_path):
    (tmp_path / "home").write_text("a file")
    (library, found), _ = built_anew()
    assert library is not None
    assert found.startswith("compiled for this process alone")


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_damaged_library_is_compiled_again(built_anew, tmp_path, content):
    kept = tmp_path / "home" / "cache" / "kernels" / f"kernels-{build._key([shutil.which('cc')])}.so"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    (library, found), times = built_anew()
    assert (library is not None, found, times) == (True, str(kept), 1)
    assert kept.stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="torch has other threads elsewhere")
def test_kernels_run_on_the_threads_of_torch():
    assert all(kernels()._team)
