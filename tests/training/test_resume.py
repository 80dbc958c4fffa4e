"""A run in one process that was ended at any time, gone on with, comes to the undisturbed run's result."""

import numpy as np
import pytest

from ckd_fed.checkpoint import load_checkpoint
from ckd_fed.config import resolve
from ckd_fed.errors import ConfigError, DataError
from ckd_fed.tracking.record import read_rows, sole_writer
from ckd_fed.training import progress
from ckd_fed.training.central import configure, train
from ckd_fed.training.memory import TeacherMemory
from ckd_fed.training.trainer import Trainer

SMALL = {
    "dataset": "toy", "data.modalities": "image,text", "plain": True, "training.epochs": 12, "training.validate-every": 2, "training.patience": 2,
    "training.batch-size": 64, "training.learning-rate": 0.01, "training.threads": 1, "model.embedding-dim": 4, "distillation.batch-size": 50,
    "federation.teacher-epochs": 4, "tracking.wandb": "off", "tracking.report": False,
}  # fmt: skip


class Ended(BaseException):
    """What ends a process."""


@pytest.fixture
def given(tmp_path, write_dataset, monkeypatch):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    return lambda **overrides: {**SMALL, "home": str(tmp_path), **{key.replace("__", "."): value for key, value in overrides.items()}}


@pytest.fixture
def end_after(monkeypatch):
    """Let training end at a number of epochs over all learners, once."""
    real = Trainer.train_epoch

    def arrange(epochs):
        left = [epochs]

        def train_epoch(self, *arguments, **more):
            if left[0] == 0:
                monkeypatch.setattr(Trainer, "train_epoch", real)
                raise Ended
            left[0] -= 1
            return real(self, *arguments, **more)

        monkeypatch.setattr(Trainer, "train_epoch", train_epoch)

    return arrange


def rows(directory):
    """Rows without what two runs of the same may differ in."""
    return [
        {key: value for key, value in row.items() if key != "time" and not key.endswith("seconds")}
        for row in read_rows(directory / "metrics.jsonl")
        if row["event"] not in ("start", "resume", "failed")
    ]


@pytest.mark.parametrize("backbone", ["vbpr", "lattice", "bm3"])
def test_the_result_is_the_undisturbed_runs(backbone, given, end_after, tmp_path):
    whole = train(resolve(given(name="whole", backbone=backbone)))
    rounds = [row for row in rows(whole.directory) if row["event"] == "round"]
    assert {row["phase"] for row in rounds} == {"teachers", "distillation"}
    trained = sum(outcome.epochs for outcome in whole.outcomes.values())
    # in the second teacher round, in the first epoch of the student, between two of its validations, before its last
    students = whole.outcomes["student"].epochs
    for end in (14, trained - students, trained - students + 3, trained - 1):
        name = f"ended-{end}"
        end_after(end)
        with pytest.raises(Ended):
            train(resolve(given(name=name, backbone=backbone)))
        config = configure({"resume": name, "home": str(tmp_path)})
        assert config.backbone == backbone
        again = train(config)
        assert rows(again.directory) == rows(whole.directory)
        assert again.outcomes == whole.outcomes
        for kind in ("best", "last"):
            ours, theirs = (load_checkpoint(run.directory / f"checkpoints/{kind}.safetensors")[0] for run in (again, whole))
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        assert sorted(path.name for path in (again.directory / "checkpoints").iterdir()) == ["best.safetensors", "last.safetensors"]


def test_a_remembered_teacher_is_not_trained_on_from_what_it_never_was(given, end_after, tmp_path, refuses):
    """Its trainer has its initial parameters: while it is not at its end, a state of it would be one that it never was in."""
    hidden = {"data__missing": "text:0.3"}  # the image teacher stays the same
    whole = train(resolve(given(name="whole", **hidden)))
    memory = TeacherMemory()
    train(resolve(given(name="before")), memory=memory)
    for name, epochs in (("early", 10), ("late", sum(whole.outcomes[role].epochs for role in ("teacher/text", "plain")) + 1)):
        end_after(epochs)
        with pytest.raises(Ended):
            train(resolve(given(name=name, **hidden)), memory=memory)
    assert not list((tmp_path / "runs/early/checkpoints").glob("*state*"))
    refuses(DataError, lambda: train(configure({"resume": "early", "home": str(tmp_path)})), "holds no state", "start the run afresh")
    again = train(configure({"resume": "late", "home": str(tmp_path)}))
    assert rows(again.directory) == rows(whole.directory)
    assert again.outcomes == whole.outcomes


def test_ended_twice(given, end_after, tmp_path):
    whole = train(resolve(given(name="whole")))
    end_after(6)
    with pytest.raises(Ended):
        train(resolve(given(name="twice")))
    assert not (tmp_path / "runs/twice/checkpoints").exists()  # within the first round: nothing to go on from
    with pytest.raises(DataError, match="start the run afresh"):
        train(configure({"resume": "twice", "home": str(tmp_path)}))
    for end in (15, 12):
        end_after(end)
        with pytest.raises(Ended):
            train(resolve(given(name="thrice")) if end == 15 else configure({"resume": "thrice", "home": str(tmp_path)}))
    assert rows(train(configure({"resume": "thrice", "home": str(tmp_path)})).directory) == rows(whole.directory)


def test_what_is_refused(given, end_after, tmp_path, refuses, write_dataset):
    def configured(**more):
        return configure({"resume": "ended", "home": str(tmp_path), **more})

    refuses(ConfigError, configured, "'ended'", "no run")
    end_after(15)
    with pytest.raises(Ended):
        train(resolve(given(name="ended")))
    refuses(ConfigError, lambda: configured(**{"training.learning-rate": 0.5}), "training.learning-rate", 0.5, 0.01)
    assert configured(**{"training.learning-rate": 0.01, "training.threads": 2}).training.threads == 2
    with sole_writer(tmp_path / "runs/ended"):
        refuses(ConfigError, lambda: train(configured()), "another process")
    write_dataset("other", n_users=60, n_items=40, seed=5)
    refuses(ConfigError, lambda: train(configured(**{"data.dir": str(tmp_path / "other")})), "other split")
    train(configured())
    refuses(ConfigError, configured, "is finished")
    (tmp_path / "runs/ended/checkpoints/state.safetensors").write_bytes(b"")
    refuses(ConfigError, configured, "ckd-fed run")


def test_states_are_written_no_more_often_than_needed(given, end_after, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "PAUSE", 3600.0)
    end_after(15)
    with pytest.raises(Ended):
        train(resolve(given(name="ended")))
    assert not (tmp_path / "runs/ended/checkpoints").exists()
