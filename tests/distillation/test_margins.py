"""Sheets of margins."""

import math

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.triples import TripleStream
from ckd_fed.distillation import margins
from ckd_fed.distillation.margins import DTYPES, largest_margin, margin_sheet


@pytest.fixture
def steps(random_interactions):
    return TripleStream(random_interactions(9, 14), "f", 0, 5, 7).epoch(0)


def tables(scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return Embeddings(*(scale * torch.randn(n, 4, generator=generator).to(dtype) for n in (9, 14)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-5)])
def test_a_sheet_equals_the_scores(steps, dtype, tolerance):
    teacher = tables()
    scores = (teacher.users.double() @ teacher.items.double().T).numpy()
    sheet = margin_sheet(teacher, steps, DTYPES[dtype])
    assert sheet.dtype == dtype
    assert sheet.shape == (len(steps), 12)
    assert len(steps) > 1
    for row, step in zip(sheet, steps, strict=True):
        expected = [scores[u, i] - scores[u, j] for u, i, j in [*step.ranking.T, *step.distillation.T]]
        np.testing.assert_allclose(row, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1e3), ("float32", 1e25)])
def test_margins_beyond_the_range_are_clipped(steps, dtype, scale):
    sheet = margin_sheet(tables(scale, torch.float64), steps, DTYPES[dtype])
    exact = margin_sheet(tables(), steps, DTYPES["float32"])
    limit = np.finfo(dtype).max
    assert np.isfinite(sheet).all()
    assert (np.abs(sheet) == limit).mean() > 0.5
    np.testing.assert_array_equal(np.sign(sheet), np.sign(exact))


def test_a_sheet_without_distillation_batch(random_interactions):
    steps = TripleStream(random_interactions(9, 14), "f", 0, 5).epoch(0)
    assert margin_sheet(tables(), steps, DTYPES["float32"]).shape == (len(steps), 5)


def test_nothing_is_said_of_items_without_the_modality(steps):
    mask = np.arange(14) % 3 != 0
    sheet, whole = (margin_sheet(tables(), steps, DTYPES["float32"], mask=m) for m in (mask, None))
    asked = np.stack([[mask[i] and mask[j] for _, i, j in [*step.ranking.T, *step.distillation.T]] for step in steps])
    assert 0 < asked.sum() < asked.size
    np.testing.assert_array_equal(sheet, np.where(asked, whole, 0))


@pytest.mark.parametrize("at_once", [2, 3, 1000], ids="{} steps at once".format)
def test_steps_at_once_are_the_same_sheet(steps, monkeypatch, at_once):
    """As on a GPU."""
    mask = np.arange(14) % 3 != 0
    expected = margin_sheet(tables(), steps, DTYPES["float32"], mask=mask)
    monkeypatch.setattr(margins, "_at_once", lambda device: at_once)
    assert len(steps) > 3
    np.testing.assert_array_equal(margin_sheet(tables(), steps, DTYPES["float32"], mask=mask), expected)


def test_the_largest_margin_does_not_exceed_the_bound():
    """To the last digit of its type: the server refuses what does."""
    half, single = DTYPES["float16"], DTYPES["float32"]
    assert largest_margin(half, math.inf) == 65504.0
    assert largest_margin(half, 0.5) == 0.5
    assert 0.299 < largest_margin(half, 0.3) <= 0.3
    assert 0.1 - 1e-7 < largest_margin(single, 0.1) <= 0.1


def test_no_steps_no_margins():
    assert margin_sheet(tables(), [], DTYPES["float16"]).shape == (0, 0)
