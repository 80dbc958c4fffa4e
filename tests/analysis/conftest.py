"""Small jobs trained for real."""

import pytest

from ckd_fed.config import resolve
from ckd_fed.training.central import train

SMALL = {
    "dataset": "toy", "plain": True, "training.epochs": 4, "training.validate-every": 2, "training.batch-size": 64, "training.threads": 1,
    "model.embedding-dim": 4, "distillation.batch-size": 50, "tracking.wandb": "off", "tracking.report": False,
}  # fmt: skip


@pytest.fixture
def runs(tmp_path, write_dataset, monkeypatch):
    """Train small jobs by name; returns the folder of runs."""
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40, n_modalities=3)

    def run(*names, **overrides):
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        for number, name in enumerate(names):
            train(resolve({**SMALL, "data.modalities": "image,text"}, {"name": name, "seed": number}, given))
        return tmp_path / "runs"

    return run
