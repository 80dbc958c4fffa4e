"""Shared fixtures: small random problems, in memory and on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_fed.data.dataset import SPLITS, load_dataset
from ckd_fed.data.interactions import Interactions

torch.set_num_threads(1)

DIMENSIONS = {"image": 6, "text": 5, "audio": 3, "title": 4}


@pytest.fixture
def refuses():
    """Assert that a call is refused with an error of one line that mentions some texts, and return the message."""

    def check(error, call, *mentions):
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        missing = [str(mention) for mention in mentions if str(mention) not in message]
        assert not missing, f"{missing} not mentioned in {message!r}"
        return message

    return check


@pytest.fixture
def interactions():
    """Interactions from one list of items a user."""

    def build(rows, n_items):
        users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        items = np.array([item for row in rows for item in row], dtype=np.int64)
        return Interactions.from_pairs(users, items, len(rows), n_items)

    return build


@pytest.fixture
def random_interactions(interactions):
    """Interactions of ``low`` to ``high`` distinct items a user."""

    def build(n_users, n_items, *, low=1, high=6, seed=0):
        rng = np.random.default_rng(seed)
        return interactions([rng.choice(n_items, rng.integers(low, high + 1), replace=False) for _ in range(n_users)], n_items)

    return build


@pytest.fixture
def random_features():
    """Modality -> random features, for the first few of image, text, audio and title."""

    def build(n_items, n_modalities=2, *, dtype=np.float64, seed=0):
        rng = np.random.default_rng(seed)
        return {m: rng.normal(size=(n_items, d)).astype(dtype) for m, d in list(DIMENSIONS.items())[:n_modalities]}

    return build


@pytest.fixture
def write_splits():
    """Write ``{"user": [items]}`` files."""

    def write(directory: Path, **splits):
        for split, table in splits.items():
            (directory / f"{split}.json").write_text(json.dumps({str(user): [int(item) for item in row] for user, row in table.items()}))

    return write


@pytest.fixture
def write_dataset(tmp_path, write_splits, random_features):
    """Factory: write a small random dataset without faults and return its folder."""

    def write(name="tiny", *, n_users=12, n_items=30, n_modalities=2, seed=0, dtype=np.float32):
        directory = tmp_path / name
        directory.mkdir()
        rng = np.random.default_rng(seed)
        splits = {split: {} for split in SPLITS}
        for user in range(n_users):
            others = rng.permutation(n_items - 1)  # the last item is user 0's, so that the ids show all items
            train = int(rng.integers(3, 7))
            splits["train"][user] = [*others[:train], n_items - 1] if user == 0 else others[:train]
            splits["val"][user] = others[train : train + 2]
            splits["test"][user] = others[train + 2 : train + 4]
        write_splits(directory, **splits)
        for modality, matrix in random_features(n_items, n_modalities, dtype=dtype, seed=seed).items():
            np.save(directory / f"{modality}_feat.npy", matrix)
        return directory

    return write


@pytest.fixture
def make_dataset(write_dataset):
    """Factory: the loaded form of :func:`write_dataset`."""

    def make(**options):
        return load_dataset(write_dataset(**options))

    return make
