"""Rows and differences gathered from a table, and their gradient."""

import pytest
import torch
import torch.nn.functional as F

from ckd_fed.backbones import gather as gather_module
from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.block_margins import block_margins, composed_margins
from ckd_fed.backbones.gather import Gather, Index, differences, gather_rows, margin


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_plain_indexing_with_repeated_rows(generator, dtype):
    table = torch.randn(7, 3, dtype=dtype, generator=generator, requires_grad=True)
    index = torch.tensor([0, 3, 3, 6])
    pairs = (torch.tensor([1, 1, 5, 2, 3]), torch.tensor([2, 2, 5, 1, 0]))  # one pair is of one item with itself
    rows, difference = gather_rows(table, Index(index, pairs))
    assert torch.equal(rows, table[index])
    assert torch.equal(difference, table[pairs[0]] - table[pairs[1]])  # the same bits
    weights = [torch.randn(x.shape, dtype=dtype, generator=generator) for x in (rows, difference)]
    ours = torch.autograd.grad((rows * weights[0]).sum() + (difference * weights[1]).sum(), table)[0]
    theirs = torch.autograd.grad((table[index] * weights[0]).sum() + ((table[pairs[0]] - table[pairs[1]]) * weights[1]).sum(), table)[0]
    torch.testing.assert_close(ours, theirs)


def test_gradient_of_either_output_alone(generator):
    table = torch.randn(5, 2, generator=generator, requires_grad=True)
    index, pairs = torch.tensor([4, 4]), (torch.tensor([0]), torch.tensor([1]))
    rows, difference = gather_rows(table, Index(index, pairs))
    alone = [torch.autograd.grad(output.sum(), table, retain_graph=True)[0] for output in (rows, difference)]
    torch.testing.assert_close(alone[0], torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0], [2, 2]]))
    torch.testing.assert_close(alone[1], torch.tensor([[1.0, 1], [-1, -1], [0, 0], [0, 0], [0, 0]]))


def test_gradcheck(generator):
    table = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    index, pairs = torch.tensor([0, 0, 5]), (torch.tensor([1, 2]), torch.tensor([2, 2]))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, Index(index, pairs)), (table,))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, Index(index))[0], (table,))


def test_margins_of_both_batches(generator):
    users, items = (torch.randn(n, 4, generator=generator) for n in (5, 8))
    ranking = Triples(torch.tensor([0, 2, 4]), torch.tensor([1, 1, 7]), torch.tensor([0, 3, 2]))
    distillation = Triples(torch.tensor([4, 4]), torch.tensor([6, 0]), torch.tensor([6, 5]))
    gather = Gather(ranking, distillation)
    rows = gather.rows(gather.of_users(users), *gather.of_items(items))
    for found, batch in ((rows.ranking_margin(), ranking), (rows.distillation_margin(), distillation)):
        scores = users @ items.T
        torch.testing.assert_close(found, scores[batch.users, batch.first] - scores[batch.users, batch.second])
    assert torch.equal(rows.ranking_margin(), margin(rows.users, rows.first, rows.second))


def test_without_a_distillation_batch_there_is_no_such_margin(generator):
    table = torch.randn(5, 4, generator=generator)
    gather = Gather(Triples(*torch.tensor([[0, 1], [2, 3], [4, 0]])), None)
    rows = gather.rows(gather.of_users(table), *gather.of_items(table))
    assert rows.difference is None
    assert rows.ranking_margin().shape == (2,)
    with pytest.raises(ValueError, match="no distillation batch"):
        rows.distillation_margin()


def test_differences_need_no_gradient(generator):
    table = torch.randn(5, 4, generator=generator, requires_grad=True)
    assert not differences(table, torch.tensor([0, 1])).requires_grad
    assert torch.equal(F.embedding(torch.tensor([3]), table) - table[2], differences(table, torch.tensor([3, 2])))


def test_differences_elsewhere_than_on_a_cpu():
    """torch's bags of weighted rows are for the CPU here; the meta device stands for the others."""
    found = differences(torch.empty(5, 4, device="meta"), torch.zeros(6, dtype=torch.long, device="meta"))
    assert (found.device.type, found.shape) == ("meta", (3, 4))


def test_gradients_are_added_in_the_order_of_the_index(generator):
    """To the bits of torch's own index_add_, with any number of threads: training depends on it."""
    table, index = torch.zeros(50, 64, requires_grad=True), torch.randint(50, (3000,), generator=generator)
    gradient = torch.randn(3000, 64, generator=generator)
    rows, _ = gather_rows(table, Index(index))
    rows.backward(gradient)
    assert torch.equal(table.grad, torch.zeros(50, 64).index_add_(0, index, gradient))


RANKING = Triples(torch.tensor([0, 2, 4]), torch.tensor([1, 1, 7]), torch.tensor([0, 3, 2]))
DISTILLATION = Triples(torch.tensor([4, 4, 0, 1]), torch.tensor([6, 0, 1, 5]), torch.tensor([6, 5, 0, 1]))


@pytest.fixture
def block_tables(generator):
    return [torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True) for n in (5, 8)]


def of_a_block(users, items, distillation, where):
    """What a block adds, as a list: from tables of all items, or of the rows of those that are asked for."""
    gather = Gather(RANKING, distillation)
    if where == "all":
        table, at = items, gather.items
    else:
        rows, at = gather.own_items(once=where == "distinct")
        table = items[rows]
    found = block_margins(users, table, gather.users, at)
    assert (found.distillation is None) == (distillation is None)
    return [part for part in found if part is not None]


@pytest.mark.parametrize("where", ["all", "distinct", "as they come"])
@pytest.mark.parametrize("distillation", [None, DISTILLATION], ids=["plain", "distilled"])
def test_margins_of_a_block(block_tables, distillation, where):
    users, items = block_tables
    found = of_a_block(users, items, distillation, where)
    scores = users @ items.T
    batches = [RANKING] if distillation is None else [RANKING, distillation]
    margins = [scores[batch.users, batch.first] - scores[batch.users, batch.second] for batch in batches]
    rows = users[RANKING.users], items[RANKING.first], items[RANKING.second]
    expected = [*margins, torch.stack([row.square().sum() for row in rows]).sum()]
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda *tables: of_a_block(*tables, distillation, where), block_tables)
    gather = Gather(RANKING, distillation)
    composed = [part for part in composed_margins(users, items, gather.users, gather.items) if part is not None]
    torch.testing.assert_close(composed, expected)  # what other devices than a CPU compute
    for part, other in zip(found, expected, strict=True):  # each alone: the others then have no gradient
        ours = torch.autograd.grad(part.sum(), block_tables, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(other.sum(), block_tables, retain_graph=True))


@pytest.mark.parametrize("distillation", [None, DISTILLATION], ids=["plain", "distilled"])
def test_a_large_table_of_a_block_has_a_sparse_gradient(block_tables, monkeypatch, distillation):
    def gradients():
        return torch.autograd.grad(sum(part.sum() for part in of_a_block(*block_tables, distillation, "all")), block_tables)

    dense = gradients()
    monkeypatch.setattr(gather_module, "SPARSE_FROM", 0)
    monkeypatch.setattr(gather_module, "SPARSE_ROWS", 0)
    sparse = gradients()
    asked = [RANKING] if distillation is None else [RANKING, distillation]
    read = [torch.cat([b.users for b in asked]).unique(), torch.cat([part for b in asked for part in b[1:]]).unique()]
    for ours, theirs, rows in zip(sparse, dense, read, strict=True):
        assert torch.equal(ours.coalesce().indices()[0], rows)
        torch.testing.assert_close(ours.to_dense(), theirs)
