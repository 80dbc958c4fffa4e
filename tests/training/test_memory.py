"""Remembered teachers are the teachers that training would give."""

import dataclasses

import numpy as np
import pytest

from ckd_fed.config import resolve
from ckd_fed.tracking.record import read_rows
from ckd_fed.training.central import train
from ckd_fed.training.fit import Fit
from ckd_fed.training.memory import TeacherMemory, learner_key

SMALL = {
    "dataset": "toy", "data.modalities": "image,text", "plain": True, "training.epochs": 12, "training.validate-every": 2, "training.patience": 1,
    "training.batch-size": 64, "training.learning-rate": 0.01, "training.threads": 1, "model.embedding-dim": 4, "distillation.batch-size": 50,
    "federation.teacher-epochs": 4, "tracking.wandb": "off", "tracking.report": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path, write_dataset):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40)
    return lambda **overrides: resolve(SMALL, {"home": str(tmp_path)}, {key.replace("__", "."): value for key, value in overrides.items()})


def rows(directory):
    """Rows without what two runs of the same may differ in."""
    return [
        {key: value for key, value in row.items() if key != "time" and not key.endswith("seconds")}
        for row in read_rows(directory / "metrics.jsonl")
        if row["event"] != "start"
    ]


@pytest.mark.parametrize("backbone", ["vbpr", "mmgcn"])
def test_a_run_with_remembered_teachers_is_the_run(backbone, config, monkeypatch):
    memory = TeacherMemory()
    train(config(name="first", backbone=backbone), memory=memory)
    trained, real = [], Fit.advance
    monkeypatch.setattr(Fit, "advance", lambda fit, *arguments, **more: trained.append(fit) or real(fit, *arguments, **more))
    remembered = train(config(name="again", backbone=backbone, distillation__rho=1), memory=memory)
    assert len(trained) == 1  # the student alone
    anew = train(config(name="anew", backbone=backbone, distillation__rho=1))
    assert len(trained) > 4
    assert rows(remembered.directory) == rows(anew.directory)
    assert remembered.outcomes == anew.outcomes


def test_what_changes_a_learner_changes_its_key(config, make_dataset):
    dataset, other = make_dataset(), make_dataset(name="other", seed=3)
    teacher, plain = learner_key(config(), dataset, "teacher/image"), learner_key(config(), dataset, "plain")
    for same in ({"distillation__rho": 1}, {"recipe": "no-generic"}, {"name": "x"}, {"tracking__tags": "a"}, {"evaluation__calibrate": False}):
        assert learner_key(config(**same), dataset, "teacher/image") == teacher
        assert learner_key(config(**same), dataset, "plain") == plain
    for different in ({"seed": 5}, {"training__learning-rate": 0.02}, {"training__patience": 3}, {"backbone": "mmgcn"}, {"model__l2": 0.1}):
        assert learner_key(config(**different), dataset, "teacher/image") != teacher
        assert learner_key(config(**different), dataset, "plain") != plain
    assert learner_key(config(balancing__method="modality-dropout"), dataset, "teacher/image") == teacher
    assert learner_key(config(balancing__method="modality-dropout"), dataset, "plain") != plain
    hidden = config(data__missing="image:0.3")
    assert learner_key(hidden, dataset, "teacher/image") != teacher
    assert learner_key(hidden, dataset, "plain") != plain
    assert learner_key(hidden, dataset, "teacher/text") == learner_key(config(), dataset, "teacher/text")
    masked = dataclasses.replace(dataset, masks={"image": np.arange(dataset.n_items) > 3})
    assert learner_key(config(), masked, "teacher/image") != teacher
    assert learner_key(config(), dataset, "teacher/text") != teacher
    assert learner_key(config(), other, "teacher/image") != teacher
