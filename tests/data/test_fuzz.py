"""Damaged files: loading succeeds or is a DataError of one line, and nothing else ever."""

import warnings

import numpy as np
import pytest

from ckd_fed.data.dataset import dense_features, load_dataset
from ckd_fed.errors import DataError

FILES = ("train.json", "val.json", "test.json", "image_feat.npy", "text_feat.npy", "text_mask.npy")


def damaged(content, rng, limit=None):
    """Truncate, lengthen, or overwrite, insert or delete a few bytes (before ``limit``)."""
    data = bytearray(content)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:
        return bytes(data) + rng.bytes(int(rng.integers(1, 20)))
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(limit or len(data), len(data))))
        if kind == 2:
            del data[at]
        elif kind == 3:
            data.insert(at, int(rng.integers(256)))
        elif kind == 4:
            data[at] = int(rng.choice(list(b"0123456789-,:(){}[]'\"eTFL. \n")))
        else:
            data[at] = int(rng.integers(256))
    return bytes(data)


def survives(directory, label):
    """None if loading does what it should, else what went wrong."""
    try:
        dataset = load_dataset(directory)
        assert all(np.isfinite(dense_features(dataset, m)).all() for m in dataset.modalities)
    except DataError as error:
        return f"{label}: several lines" if "\n" in str(error) else None
    except Exception as error:
        return f"{label}: {type(error).__name__}: {error}"
    return None


@pytest.fixture
def directory(write_dataset):
    directory = write_dataset(n_users=8, n_items=16)
    np.save(directory / "text_mask.npy", np.arange(16) % 4 > 0)
    return directory


@pytest.mark.parametrize("file", FILES)
def test_random_damage(directory, file):
    path, rng = directory / file, np.random.default_rng(FILES.index(file))
    content = path.read_bytes()
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(60):
            path.write_bytes(damaged(content, rng))
            outcomes.append(survives(directory, f"{file} #{number}"))
    assert not [outcome for outcome in outcomes if outcome]


def test_random_damage_to_headers(directory):
    path, rng = directory / "image_feat.npy", np.random.default_rng(7)
    content = path.read_bytes()
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(400):
            path.write_bytes(damaged(content, rng, limit=80))
            outcomes.append(survives(directory, f"header #{number}"))
    assert not [outcome for outcome in outcomes if outcome]
