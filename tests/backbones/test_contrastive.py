"""The contrastive losses against their formulas, written out."""

import pytest
import torch
from torch.nn.functional import normalize

from ckd_fed.backbones import contrastive
from ckd_fed.backbones.contrastive import catalogue_contrast, checked_temperature, info_nce

N = 13


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))


def catalogue_by_hand(a, b, temperature):
    a, b = normalize(a), normalize(b)
    within, across = (a @ a.T / temperature).exp(), (a @ b.T / temperature).exp()
    return -(across.diag() / (within.sum(1) + across.sum(1) - within.diag())).log().mean()


def info_nce_by_hand(a, b, temperature):
    e = (normalize(a) @ normalize(b).T / temperature).exp()
    return -(e.diag() / e.sum(1)).log().mean()


def tile(monkeypatch, rows, columns):
    monkeypatch.setattr(contrastive, "_ROWS", rows)
    monkeypatch.setattr(contrastive, "_COLUMNS", columns)


@pytest.mark.parametrize("tiles", [(1, 1), (4, 3), (5, 8), (N, N), (100, 2 * N)])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_catalogue_contrast_and_its_gradient(pair, monkeypatch, tiles, temperature):
    tile(monkeypatch, *tiles)
    expected = catalogue_by_hand(*pair, temperature)
    found = catalogue_contrast(*pair, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(3 * found, pair), torch.autograd.grad(3 * expected, pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tiles", [(1, 1), (4, 3), (5, 8), (N, N), (100, 2 * N)])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_catalogue_contrast_with_itself(pair, monkeypatch, tiles, temperature):
    """A teacher's case: both are one tensor, and its gradient is the sum of both sides."""
    tile(monkeypatch, *tiles)
    a = pair[0]
    found, expected = (loss(a, a, temperature) for loss in (catalogue_contrast, catalogue_by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    expected = torch.autograd.grad(3 * expected, a)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * found, a)[0], expected, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(catalogue_contrast(a, a, temperature), found)


def test_the_lowest_temperature_neither_overflows_nor_underflows(pair):
    a, b = (x.float() for x in pair)
    assert checked_temperature(0.02) == 0.02
    loss = catalogue_contrast(a, b, 0.02)
    gradients = torch.autograd.grad(loss, pair)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(loss, catalogue_by_hand(*pair, 0.02).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tables", [1, 2])
def test_memory_is_linear_in_the_items(monkeypatch, tables):
    """Neither the strip that is kept nor a product has more entries than a strip, whatever the number of items; one table has half the work."""
    kept, products = [], []
    empty, product = torch.Tensor.new_empty, torch.mm

    def watched_empty(like, *size):
        result = empty(like, *size)
        kept.append(result.numel())
        return result

    def watched_product(one, two, *, out):
        products.append(out.numel())
        return product(one, two, out=out)

    monkeypatch.setattr(torch.Tensor, "new_empty", watched_empty)
    monkeypatch.setattr(torch, "mm", watched_product)
    monkeypatch.setattr(contrastive, "_STRIP", 4000)
    tile(monkeypatch, 100, 150)
    a = torch.randn(500, 3)
    catalogue_contrast(a, a if tables == 1 else torch.randn(500, 3), 0.5)
    assert kept == [4000]
    assert sum(products) == tables * 500 * 500


def test_without_gradient(pair):
    with torch.no_grad():
        assert torch.equal(catalogue_contrast(*pair, 0.5), catalogue_contrast(*(x.detach() for x in pair), 0.5))


def test_info_nce_and_its_gradient(pair):
    """Repeated rows stay in the denominator."""
    rows = [0, 1, 1, 5, 2]
    found, expected = (loss(*(x[rows] for x in pair), 0.2) for loss in (info_nce, info_nce_by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(found, pair), torch.autograd.grad(expected, pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
