"""Sheets of margins."""

import warnings

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.triples import StepTriples, TripleStream
from ckd_fed.distillation.margins import DTYPES, margin_sheet, teacher_margins


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


def step_of(n_ranking, n_distillation):
    """A step of which only the sizes matter."""
    return StepTriples(np.zeros((3, n_ranking), dtype=np.int32), np.zeros((3, n_distillation), dtype=np.int32))


def test_nothing_is_said_of_items_without_the_modality(steps):
    mask = np.arange(14) % 3 != 0
    sheet, whole = (margin_sheet(tables(), steps, DTYPES["float32"], mask=m) for m in (mask, None))
    asked = np.stack([[mask[i] and mask[j] for _, i, j in [*step.ranking.T, *step.distillation.T]] for step in steps])
    assert 0 < asked.sum() < asked.size
    np.testing.assert_array_equal(sheet, np.where(asked, whole, 0))
    found = teacher_margins({"text": sheet}, 1, steps[1], torch.zeros(1), {"text": mask})["text"]
    assert found.asked_ranking.tolist() == asked[1, :5].tolist()
    assert found.asked_distillation.tolist() == asked[1, 5:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_split_at_the_batch_size(dtype):
    sheets = {m: (np.arange(24).reshape(2, 12) + k).astype(np.float16) for k, m in enumerate(("image", "text"))}
    found = teacher_margins(sheets, 1, step_of(5, 7), torch.zeros(1, dtype=dtype))
    assert list(found) == ["image", "text"]
    for k, margins in enumerate(found.values()):
        assert margins.asked_ranking is None
        assert margins.asked_distillation is None
        assert margins.ranking.dtype == margins.distillation.dtype == dtype
        assert margins.ranking.tolist() == [12 + k, 13 + k, 14 + k, 15 + k, 16 + k]
        assert margins.distillation.tolist() == [17 + k, 18 + k, 19 + k, 20 + k, 21 + k, 22 + k, 23 + k]


@pytest.fixture
def every_warning():
    """Some of torch's warnings come once a process unless told otherwise; let all come, as errors."""
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
def test_a_read_only_sheet_can_be_used():
    """Sheets arrive as views of a message or a memory map."""
    sheet = np.frombuffer(np.arange(12, dtype=np.float32).tobytes(), dtype=np.float32).reshape(1, 12)
    assert teacher_margins({"text": sheet}, 0, step_of(5, 7), torch.zeros(1))["text"].ranking.tolist() == [0, 1, 2, 3, 4]
