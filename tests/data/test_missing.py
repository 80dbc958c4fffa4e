"""The missing-modality simulator: how many items, which ones, and what becomes of them in training."""

import dataclasses

import numpy as np
import pytest

from ckd_fed.config import resolve
from ckd_fed.data.dataset import dense_features, load_dataset
from ckd_fed.data.missing import hide
from ckd_fed.errors import ConfigError
from ckd_fed.training.build import build_trainer
from ckd_fed.training.central import train


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(n_items=50, n_modalities=3)


def hidden(dataset, share, seed=0, modality="text"):
    masks = hide(dataset, {modality: share}, seed).masks
    return set(np.flatnonzero(~masks[modality]).tolist()) if modality in masks else set()


def test_as_many_as_asked_for_and_the_smaller_share_among_the_greater(dataset):
    assert [len(hidden(dataset, share)) for share in (0, 0.1, 0.3, 0.6, 1)] == [0, 5, 15, 30, 49]
    assert hidden(dataset, 0.1) < hidden(dataset, 0.3) < hidden(dataset, 0.6)
    assert hidden(dataset, 0.3, seed=1) != hidden(dataset, 0.3)
    assert hidden(dataset, 0.3, modality="image") != hidden(dataset, 0.3)
    assert set(hide(dataset, {"text": 0.3}, 0).masks) == {"text"}


def test_only_items_that_have_the_modality_are_hidden(dataset):
    mask = np.arange(50) % 2 > 0
    masked = dataclasses.replace(dataset, masks={"text": mask})
    after = hide(masked, {"text": 0.4}, 0).masks["text"]
    assert not (after & ~mask).any()
    assert after.sum() == 15
    assert mask.sum() == 25  # the dataset's own is left alone


def test_a_teacher_and_a_student_hide_the_same_items(dataset):
    teacher = hide(dataset.of_modalities(["text"]), {"text": 0.3, "image": 0.6}, 0)
    assert set(teacher.masks) == {"text"}
    np.testing.assert_array_equal(teacher.masks["text"], hide(dataset, {"text": 0.3}, 0).masks["text"])


def test_an_unknown_modality(dataset, refuses):
    refuses(ConfigError, lambda: hide(dataset, {"txet": 0.3}, 0), "data.missing", "did you mean 'text'")


def test_an_unknown_modality_ends_a_central_run_before_it_begins(tmp_path, write_dataset, refuses):
    config = resolve({"data.missing": "txet:0.3", "data.dir": str(write_dataset()), "home": str(tmp_path), "tracking.wandb": "off"})
    refuses(ConfigError, lambda: train(config, lambda line: None), "data.missing", "did you mean 'text'")
    assert not (tmp_path / "runs").exists()


def test_the_configuration(refuses):
    assert resolve({"data.missing": "text:0.3, audio:0"}).data.hidden_shares == {"text": 0.3, "audio": 0.0}
    assert resolve({}).data.hidden_shares == {}
    for value in ("text", "text:x", "text:1.5", "text:-0.1", "text:nan", ":0.3", "text:0.1,text:0.2"):
        refuses(ConfigError, lambda value=value: resolve({"data.missing": value}), "data.missing", repr(value))


def test_hidden_items_are_trained_with_the_mean_of_the_others(write_dataset):
    dataset = load_dataset(write_dataset(n_items=30))
    config = resolve({"data.missing": "text:0.5", "backbone": "vbpr", "training.device": "cpu"})
    plain = resolve({"backbone": "vbpr", "training.device": "cpu"})
    mask = hide(dataset, {"text": 0.5}, config.seed).masks["text"]
    assert mask.sum() == 15
    buffers = lambda chosen: build_trainer(chosen, dataset, "student").backbone.features("text").numpy()  # noqa: E731
    raw, trained = buffers(plain), buffers(config)
    np.testing.assert_array_equal(raw, dense_features(dataset, "text"))
    np.testing.assert_array_equal(trained[mask], raw[mask])
    np.testing.assert_allclose(trained[~mask], np.broadcast_to(raw[mask].mean(0), (15, raw.shape[1])), rtol=1e-5)
