"""Rows projected in blocks, against torch's own operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ckd_fed.backbones import projection
from ckd_fed.backbones.build import build_backbone


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 48, 104, 192, 80_000], ids="{} bytes a block".format)  # under a row, 1, 2 and 4 rows, all
@pytest.mark.parametrize("index", [[4, 0, 4, 8, 1, 1, 7], [3], []], ids=["repeated", "one", "none"])
def test_rows_and_gradients_are_those_of_the_layer(linear, monkeypatch, block, index):
    monkeypatch.setattr(projection, "BLOCK", block)
    features, rows = torch.randn(9, 6, dtype=torch.float64), torch.tensor(index, dtype=torch.long)
    weight = torch.randn(len(index), 3, dtype=torch.float64)
    found, expected = projection.project_rows(features, rows, linear), linear(features[rows])
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    ours = torch.autograd.grad((found * weight).sum(), list(linear.parameters()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(linear.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_features_are_read_only(linear):
    """They are mapped from a file, and no gradient goes to them."""
    features = torch.randn(9, 6, dtype=torch.float64)
    before = features.clone()
    projection.project_rows(features, torch.tensor([2, 5]), linear).sum().backward()
    assert torch.equal(features, before)
    assert features.grad is None


@pytest.mark.parametrize("block", [1, 24, 48, 80_000], ids="{} bytes a block".format)  # under a row, 2 and 4 rows, all
def test_features_in_bfloat16(monkeypatch, block):
    """All rows, and some of them in blocks: what exact products of the rounded features give, but for the rounding of the other factor and of
    the result, 2^-9 each. Nothing but the features is bfloat16."""
    monkeypatch.setattr(projection, "BLOCK", block)
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    features, index, signal = torch.randn(9, 6).bfloat16(), torch.tensor([4, 0, 4, 8, 1, 1, 7]), torch.randn(7, 3)
    exact = nn.Linear(6, 3, dtype=torch.float64)
    exact.load_state_dict(linear.state_dict())
    expected = exact(features.double()[index])
    gradients = torch.autograd.grad((expected * signal).sum(), list(exact.parameters()))
    for found in (projection.project_rows(features, index, linear), projection.project(features, linear)[index]):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=6 * 2**-8)
        assert not torch.equal(found.double(), expected)
        for ours, theirs in zip(torch.autograd.grad((found * signal).sum(), list(linear.parameters())), gradients, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=7 * 2**-7)


def test_it_pays_beyond_a_block():
    features = torch.empty(9, projection.BLOCK // 32)
    assert not projection.pays(features, 8)
    assert projection.pays(features, 9)
    assert not projection.pays(features.to("meta"), 9)
    assert not projection.pays(features.bfloat16(), 9)  # half as many bytes


def test_it_does_not_pay_where_all_features_are_a_block():
    """However many rows are asked for, some of them several times."""
    assert not projection.pays(torch.empty(8, projection.BLOCK // 32), 100)


def test_a_device_never_holds_the_features_wider_than_they_are_to_be(make_dataset):
    """Or its memory would be full before they are narrowed."""
    dataset, held = make_dataset(n_items=50), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            result = operation(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "meta":
                held.append((tuple(result.shape), result.dtype))
            return result

    features = {m: np.asarray(x, dtype=np.float32) for m, x in dataset.features.items()}
    with Watch():
        build_backbone("vbpr", dataset.train, features, {}, seed=0, device=torch.device("meta"), feature_dtype=torch.bfloat16)
    assert {dtype for shape, dtype in held if shape in {x.shape for x in features.values()}} == {torch.bfloat16}
