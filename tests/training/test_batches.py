"""An epoch's batches, made several steps at a time."""

import warnings

import numpy as np
import pytest
import torch

from ckd_fed.data.triples import TripleStream
from ckd_fed.training import batches as module
from ckd_fed.training.batches import batches

CPU = torch.device("cpu")
B, K, N_ITEMS = 3, 7, 14


@pytest.fixture
def steps(random_interactions):
    return TripleStream(random_interactions(9, N_ITEMS), "f", 0, B, K).epoch(0)


@pytest.fixture
def sheets(steps):
    values = np.arange(len(steps) * (B + K)).reshape(len(steps), B + K).astype(np.float16)
    return {"image": values, "text": values + 1000}


@pytest.mark.parametrize("ahead", [1, 2, 3, 1000], ids="{} steps ahead".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_step_has_its_own_triples_and_margins(steps, sheets, monkeypatch, ahead, dtype):
    monkeypatch.setattr(module, "AHEAD", ahead)
    mask = np.arange(N_ITEMS) % 3 != 0
    found = [packed.batch() for packed in batches(iter(steps), sheets, {"text": mask, "another": mask}, CPU, dtype)]
    assert len(found) == len(steps) > 3
    for row, (batch, step) in enumerate(zip(found, steps, strict=True)):
        assert torch.equal(torch.stack(batch.ranking), torch.from_numpy(step.ranking).long())
        assert torch.equal(torch.stack(batch.distillation), torch.from_numpy(step.distillation).long())
        assert list(batch.margins) == ["image", "text"]
        for modality, margins in batch.margins.items():
            assert margins.ranking.dtype == margins.distillation.dtype == dtype
            assert margins.ranking.tolist() == sheets[modality][row, :B].tolist()
            assert margins.distillation.tolist() == sheets[modality][row, B:].tolist()
        assert batch.margins["image"].asked_ranking is batch.margins["image"].asked_distillation is None
        text = batch.margins["text"]
        assert text.asked_ranking.tolist() == [mask[i] and mask[j] for _, i, j in step.ranking.T]
        assert text.asked_distillation.tolist() == [mask[i] and mask[j] for _, i, j in step.distillation.T]


def test_without_teachers_there_is_the_ranking_batch_alone(steps):
    for packed, step in zip(batches(steps, None, {}, CPU, torch.float32), steps, strict=True):
        batch = packed.batch()
        assert torch.equal(torch.stack(batch.ranking), torch.from_numpy(step.ranking).long())
        assert batch.distillation is None
        assert batch.margins == {}


def test_no_more_steps_are_drawn_than_are_made_at_a_time(steps, monkeypatch):
    """An epoch of large data is never held whole."""
    monkeypatch.setattr(module, "AHEAD", 2)
    drawn = []
    made = batches((drawn.append(n) or step for n, step in enumerate(steps)), None, {}, CPU, torch.float32)
    assert drawn == []
    for expected in (2, 2, 4):
        next(made)
        assert len(drawn) == expected


@pytest.fixture
def every_warning():
    """Some of torch's warnings come once a process unless told otherwise; let all come, as errors."""
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
def test_a_read_only_sheet_can_be_used(steps):
    """Sheets arrive as views of a message or a memory map."""
    raw = np.arange(len(steps) * (B + K), dtype=np.float32)
    sheet = np.frombuffer(raw.tobytes(), dtype=np.float32).reshape(len(steps), B + K)
    first = next(batches(steps, {"text": sheet}, {}, CPU, torch.float32))
    assert first.batch().margins["text"].ranking.tolist() == [0, 1, 2]
