"""A federated run with one student is the central run, and everything that may vary about the federation leaves it so."""

import json

import numpy as np
import pytest

from ckd_fed.analysis.users import load_users
from ckd_fed.backbones import BACKBONES
from ckd_fed.checkpoint import load_checkpoint, to_tensors
from ckd_fed.config import resolve
from ckd_fed.data.dataset import load_dataset
from ckd_fed.evaluation import tested
from ckd_fed.tracking.record import read_rows
from ckd_fed.training.build import build_trainer
from ckd_fed.training.central import train
from ckd_fed.wire import unpack_array
from clients import node as client_node

SMALL = {
    "dataset": "toy",
    "data.modalities": "image,text",
    "model.embedding-dim": 8,
    "training.batch-size": 64,
    "training.epochs": 15,
    "training.validate-every": 5,
    "training.learning-rate": 0.01,
    "training.threads": 1,
    "distillation.batch-size": 100,
    "distillation.rho": 1.0,
    "federation.teacher-epochs": 10,
    "tracking.wandb": "off",
    "tracking.report": False,
}


@pytest.fixture
def toy(tmp_path, write_dataset):
    """A dataset at ``<home>/data/toy``; returns the home."""
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40, n_modalities=3)
    return tmp_path


def parameters(home, run, name="last"):
    return load_checkpoint(home / "runs" / run / "checkpoints" / f"{name}.safetensors")[0]


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_three_rounds_give_the_central_student(backbone, toy, federate):
    overrides = {**SMALL, "backbone": backbone, "distillation.margin-dtype": "float32", "plain": True, "evaluation.calibrate": True}
    central = train(resolve(overrides, {"home": str(toy), "name": "central"}))
    result, _, _ = federate(overrides)

    assert largest_difference(parameters(toy, "fed"), parameters(toy, "central")) <= 1e-6
    assert result.outcomes.keys() == central.outcomes.keys() == {"teacher/image", "teacher/text", "plain", "student"}
    for name, outcome in central.outcomes.items():
        assert result.outcomes[name].best_epoch == outcome.best_epoch, name
        assert result.outcomes[name].test == pytest.approx(outcome.test, abs=1e-12), name
        assert result.outcomes[name].readout == pytest.approx(outcome.readout, rel=1e-4, abs=1e-6), name
        assert ("calibrated/recall@20" in outcome.test) == (name in ("plain", "student"))
    rounds = [[row for row in read_rows(toy / "runs" / run / "metrics.jsonl") if row["event"] == "round"] for run in ("fed", "central")]
    for federated, alone in zip(*rounds, strict=True):
        for key in alone:
            if key != "time" and not key.endswith("seconds") and not key.startswith("bytes"):
                assert federated[key] == pytest.approx(alone[key], abs=1e-6), key


@pytest.mark.parametrize("workers", [1, 2])
def test_a_validation_on_some_users_is_the_same_ones_everywhere(workers, toy, federate):
    """With two students the server merges a validation from their shares of the sampled users."""
    overrides = {**SMALL, "training.validation-users": 20, "distillation.margin-dtype": "float32", "federation.student-workers": workers}
    central = train(resolve({**overrides, "federation.student-workers": 1}, {"home": str(toy), "name": "central"}))
    result, _, _ = federate(overrides)
    teachers = {name: outcome.best_epoch for name, outcome in central.outcomes.items() if name != "student"}
    assert {name: result.outcomes[name].best_epoch for name in teachers} == teachers
    for run in ("fed", "central"):
        rows = [row for row in read_rows(toy / "runs" / run / "metrics.jsonl") if row["event"] == "round" and "val/recall@20" in row]
        assert rows
        assert load_users(toy / "runs" / run / "test_users.npz").users.size > 20  # the test is for all
    if workers == 1:
        assert result.outcomes["student"].test == pytest.approx(central.outcomes["student"].test, abs=1e-12)


def same_users(home, first, second):
    ours, theirs = (load_users(home / "runs" / run / "test_users.npz") for run in (first, second))
    assert ours.split == theirs.split
    np.testing.assert_array_equal(ours.users, theirs.users)
    assert ours.values.keys() == theirs.values.keys()
    for name, column in theirs.values.items():
        np.testing.assert_allclose(ours.values[name], column, atol=1e-6, err_msg=name)


def groups(home, run):
    (row,) = [row for row in read_rows(home / "runs" / run / "metrics.jsonl") if row["event"] == "groups"]
    return row["groups"]


def test_users_and_groups_are_those_of_the_central_run(toy, federate):
    overrides = {**SMALL, "distillation.margin-dtype": "float32"}
    train(resolve(overrides, {"home": str(toy), "name": "central"}))
    federate(overrides)
    same_users(toy, "fed", "central")
    found = groups(toy, "fed")
    assert {(row["model"], row["kind"]) for row in found} == {
        (m, k) for m in ("teacher/image", "teacher/text", "student") for k in ("users", "items")
    }
    assert found == [pytest.approx(row) for row in groups(toy, "central")]
    federate({**SMALL, "evaluation.user-table": False}, run="without")
    assert not (toy / "runs" / "without" / "test_users.npz").exists()
    assert len(groups(toy, "without")) == len(found)


def test_two_workers_users_are_all_users(toy, federate):
    result, _, _ = federate({**SMALL, "federation.student-workers": 2}, nodes=[{"partition-id": i, "num-partitions": 4} for i in range(4)])
    table = load_users(toy / "runs" / "fed" / "test_users.npz")
    assert len(table.users) == 60
    assert table.values["student/recall@20"].mean() == pytest.approx(result.outcomes["student"].test["recall@20"], abs=1e-6)


def test_items_without_a_modality_and_items_never_trained(toy, federate, monkeypatch):
    """Hidden rows, a mask on disk and cold items at once: teachers are not asked about what they lack, on either path."""
    monkeypatch.setattr(tested, "ENOUGH", 0)
    directory = toy / "data" / "toy"
    mask = np.arange(40) % 5 != 1
    np.save(directory / "text_mask.npy", mask)
    table = json.loads((directory / "train.json").read_text())
    cold = {4, 9, 23}
    (directory / "train.json").write_text(json.dumps({user: [i for i in items if i not in cold] for user, items in table.items()}))
    overrides = {**SMALL, "distillation.margin-dtype": "float32", "data.missing": "image:0.4"}
    central = train(resolve(overrides, {"home": str(toy), "name": "central"}))
    result, grid, _ = federate(overrides)
    assert largest_difference(parameters(toy, "fed"), parameters(toy, "central")) <= 1e-6
    for name, outcome in central.outcomes.items():
        assert result.outcomes[name].test == pytest.approx(outcome.test, abs=1e-12), name
        assert {"warm/recall@20", "cold/recall@20"} <= outcome.test.keys()
    sheets = {
        reply.content["reply"]["role"]: np.frombuffer(reply.content["arrays"]["margins/0"].data, dtype="<f4")
        for message, reply in grid.seen
        if message.metadata.message_type == "query.score"
    }
    assert 0.2 < (sheets["teacher/text"] == 0).mean() < 0.5  # 1 - .8 * .8 = .36 of the random pairs
    assert 0.5 < (sheets["teacher/image"] == 0).mean() < 0.8  # 1 - .6 * .6 = .64
    rounds = [row for row in read_rows(toy / "runs" / "central" / "metrics.jsonl") if row["event"] == "round" and row["phase"] == "distillation"]
    assert all(0 < row[f"weight/{m}"] <= 2 for row in rounds for m in ("image", "text"))


def test_float16_margins_move_the_student_only_by_rounding(toy, federate):
    exact, _, _ = federate({**SMALL, "distillation.margin-dtype": "float32"}, run="exact")
    rounded, _, _ = federate(SMALL, run="rounded")
    assert 0 < largest_difference(parameters(toy, "rounded"), parameters(toy, "exact")) < 1e-2
    assert rounded.outcomes["student"].validation == pytest.approx(exact.outcomes["student"].validation, abs=0.02)


def test_a_fresh_process_for_every_message_changes_nothing(toy, federate):
    """As in a deployment: what a node needs is on its disk."""
    federate(SMALL, run="kept")

    def forget(message, reply):
        client_node._FITS.clear()
        return reply

    federate(SMALL, run="forgotten", tamper=forget)
    assert largest_difference(parameters(toy, "forgotten"), parameters(toy, "kept")) == 0


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_the_number_of_simulated_nodes_changes_nothing(nodes, toy, federate):
    _, grid, federation = federate(SMALL, nodes=[{"partition-id": index, "num-partitions": nodes} for index in range(nodes)])
    assert len(federation.rounds.plan.students) == 1
    assert len(federation.rounds.plan.spare) == max(0, nodes - 3)
    reference = federate(SMALL, run="reference")
    assert reference[0].outcomes["student"].test
    assert largest_difference(parameters(toy, "fed"), parameters(toy, "reference")) == 0
    assert grid.seen


def test_three_modalities_need_no_new_line(toy, federate):
    result, _, federation = federate({**SMALL, "data.modalities": "image,text,audio"})
    assert set(result.outcomes) == {"teacher/image", "teacher/text", "teacher/audio", "student"}
    for state in federation.distillation.reweighting.rounds.values():
        assert sum(state.weights.values()) == pytest.approx(3)
        assert sum(state.shares.values()) == pytest.approx(1)


def test_two_student_workers_share_the_steps_and_are_averaged(toy, federate):
    result, grid, federation = federate(
        {**SMALL, "federation.student-workers": 2}, nodes=[{"partition-id": i, "num-partitions": 4} for i in range(4)]
    )
    assert len(federation.rounds.plan.students) == 2
    steps = federation.rounds.steps
    samples = {
        reply.content["reply"]["role"]: reply.content["reply"]["samples"]
        for message, reply in grid.seen
        if message.metadata.message_type == "train.distil"
    }
    assert samples == {"student/0": 5 * len(range(0, steps, 2)) * 64, "student/1": 5 * len(range(1, steps, 2)) * 64}
    last = [reply for message, reply in grid.seen if message.metadata.message_type == "train.distil"][-2:]
    weights = [reply.content["reply"]["samples"] for reply in last]
    for name, array in parameters(toy, "fed").items():
        sent = [np.frombuffer(reply.content["arrays"][f"weights/{name}"].data, dtype="<f4").reshape(array.shape) for reply in last]
        np.testing.assert_allclose(array, np.average(sent, axis=0, weights=weights), rtol=1e-6, atol=1e-7)
    assert 0 < result.outcomes["student"].test["recall@20"] <= 1


def test_several_students_are_told_once_that_their_rounds_are_short(toy, federate):
    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    short = {**SMALL, "training.epochs": 10, "training.validate-every": 2}
    for share, times in {1e-9: 1, 1: 0}.items():
        lines = []
        federate({**short, "federation.student-workers": 2, "federation.messaging-share": share}, run=f"{share}", nodes=nodes, write=lines.append)
        assert sum("of a round of 2 students" in line for line in lines) == times


def test_several_students_on_one_simulated_node_change_nothing(toy, federate):
    for run, nodes in {"apart": 4, "together": 1}.items():
        nodes = [{"partition-id": index, "num-partitions": nodes} for index in range(nodes)]
        federate({**SMALL, "federation.student-workers": 2}, run=run, nodes=nodes)
    assert largest_difference(parameters(toy, "apart"), parameters(toy, "together")) == 0


def test_several_students_learn_faster_in_proportion(toy, federate):
    """Or as ``federation.rate-scale`` says: their mean moves as far as one of them, which takes a W-th of the steps."""
    nodes = [{"partition-id": index, "num-partitions": 4} for index in range(4)]
    one_epoch = {**SMALL, "training.epochs": 1, "training.validate-every": 1}
    for run, overrides in {
        "scaled": {"federation.student-workers": 2},
        "unscaled": {"federation.student-workers": 2, "federation.rate-scale": 1, "training.learning-rate": 2 * SMALL["training.learning-rate"]},
        "slow": {"federation.student-workers": 2, "federation.rate-scale": 1},
        "alone": {"federation.rate-scale": 3},
        "plainly alone": {},
    }.items():
        federate({**one_epoch, "distillation.enabled": False, **overrides}, run=run, nodes=nodes)
    assert largest_difference(parameters(toy, "scaled"), parameters(toy, "unscaled")) == 0
    assert largest_difference(parameters(toy, "alone"), parameters(toy, "plainly alone")) == 0
    assert largest_difference(parameters(toy, "scaled"), parameters(toy, "slow")) > 0


def test_without_distillation_no_teacher_is_asked(toy, federate):
    result, grid, _ = federate({**SMALL, "distillation.enabled": False})
    assert set(result.outcomes) == {"student"}
    assert {message.metadata.message_type for message, _ in grid.seen} == {"query.enrol", "train.distil", "query.evaluate", "query.forget"}
    train(resolve(SMALL, {"distillation.enabled": False, "home": str(toy), "name": "central"}))
    assert largest_difference(parameters(toy, "fed"), parameters(toy, "central")) <= 1e-6


@pytest.mark.parametrize(("share", "megabytes", "distil"), [(1, 64, 6), (0, 64, 3), (0, 1e-6, 30)], ids=["fixed", "growing", "an epoch at a time"])
def test_the_length_of_a_lone_students_rounds_changes_nothing(share, megabytes, distil, toy, federate):
    overrides = {**SMALL, "training.epochs": 30, "distillation.margin-dtype": "float32"}
    train(resolve(overrides, {"home": str(toy), "name": "central"}))
    _, grid, federation = federate({**overrides, "federation.messaging-share": share, "federation.stretch-mb": megabytes})
    asked = [message.content["request"]["epochs"] for message, _ in grid.seen if message.metadata.message_type == "train.distil"]
    assert sum(asked) == 30
    assert len(asked) == distil  # growing: 5, 5 (asked for before the first was measured), 20
    assert largest_difference(parameters(toy, "fed"), parameters(toy, "central")) == 0
    assert largest_difference(parameters(toy, "fed", "best"), parameters(toy, "central", "best")) == 0
    rows = [[row for row in read_rows(toy / "runs" / run / "metrics.jsonl") if row.get("phase") == "distillation"] for run in ("fed", "central")]
    assert [row["epoch"] for row in rows[0]] == [row["epoch"] for row in rows[1]] == [5, 10, 15, 20, 25, 30]
    assert [row["val/recall@20"] for row in rows[0]] == [row["val/recall@20"] for row in rows[1]]
    totals = federation.rounds.state.totals
    assert sum(row["seconds"] for row in rows[0]) <= totals.seconds
    if megabytes > 1:  # rounds without a validation have no row
        assert sum(row["bytes/margins"] for row in rows[0]) == pytest.approx(totals.margin_bytes)


def test_a_lone_student_stops_itself_within_a_round(toy, federate):
    overrides = {**SMALL, "training.epochs": 200, "training.patience": 2, "training.validate-every": 2, "training.learning-rate": 0.05}
    central = train(resolve(overrides, {"home": str(toy), "name": "central"}))
    result, _, federation = federate({**overrides, "federation.messaging-share": 0})
    student = result.outcomes["student"]
    assert federation.rounds.state.stretch > 2
    assert student.epochs == central.outcomes["student"].epochs < 200
    assert student.best_epoch == central.outcomes["student"].best_epoch < student.epochs
    assert student.test == pytest.approx(central.outcomes["student"].test)
    assert largest_difference(parameters(toy, "fed", "best"), parameters(toy, "central", "best")) == 0


def test_several_students_are_averaged_as_often_whatever_messages_take(toy, federate):
    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    _, grid, _ = federate({**SMALL, "federation.student-workers": 2, "federation.messaging-share": 0}, nodes=nodes)
    asked = [message.content["request"]["epochs"] for message, _ in grid.seen if message.metadata.message_type == "train.distil"]
    assert asked == [5] * 6


def rows_of(home, run):
    rows = [row for row in read_rows(home / "runs" / run / "metrics.jsonl") if row.get("phase") == "distillation"]
    return [{name: value for name, value in row.items() if not name.startswith(("seconds", "bytes", "time"))} for row in rows]


def test_what_several_students_came_to_is_validated_by_their_next_round(toy, federate):
    """No request of its own but for the last epoch's; and it is of the mean that they start from, over all users."""
    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    result, grid, federation = federate({**SMALL, "federation.student-workers": 2}, nodes=nodes)
    kinds = [message.metadata.message_type.partition(".")[2] for message, _ in grid.seen]
    assert (kinds.count("distil"), kinds.count("evaluate")) == (6, 4)  # two students: three rounds, the last validation and the test
    rows = rows_of(toy, "fed")
    assert [(row["epoch"], row["round"]) for row in rows] == [(5, 3), (10, 4), (15, 5)]
    assert federation.rounds.state.awaited is None
    took = [row["seconds"] for row in read_rows(toy / "runs" / "fed" / "metrics.jsonl") if row.get("phase") == "distillation"]
    assert sum(took) <= federation.rounds.state.totals.seconds
    dataset = load_dataset(toy / "data" / "toy", modalities=("image", "text"))
    trainer = build_trainer(federation.rounds.config, dataset, "student", distilled=True)
    sent = [message.content for message, _ in grid.seen if message.metadata.message_type == "train.distil"]
    assert [content["request"]["evaluate"] for content in sent] == [False, False, True, True, True, True]
    ended_with = [to_tensors({name: unpack_array(array) for name, array in content["arrays"].items()}, "weights/") for content in sent[2::2]]
    ended_with.append(to_tensors(parameters(toy, "fed"), ""))
    for row, weights in zip(rows, ended_with, strict=True):
        trainer.restore(weights)
        expected = trainer.diagnose(dataset.val).compute()
        assert {name.removeprefix("val/"): row[name] for name in row if "@" in name and name.startswith(("val/", "only/"))} == pytest.approx(expected)
    assert result.outcomes["student"].validation == max(row["val/recall@20"] for row in rows)


def test_several_students_that_stop_early_end_with_what_they_were_validated_with(toy, federate):
    """The round that told them to stop trained on; nothing of that is left."""
    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    eager = {**SMALL, "federation.student-workers": 2, "training.patience": 1, "training.validate-every": 2, "training.learning-rate": 0.05}
    result, grid, federation = federate({**eager, "training.epochs": 200}, run="stopped", nodes=nodes)
    epochs = result.outcomes["student"].epochs
    assert federation.rounds.state.stopping.stop
    assert epochs < 100
    asked = [message.content["request"]["from-epoch"] for message, _ in grid.seen if message.metadata.message_type == "train.distil"]
    assert asked[-1] == epochs  # one round more than counts
    assert [message.metadata.message_type for message, _ in grid.seen].count("query.evaluate") == 2  # the test
    other, _, _ = federate({**eager, "training.epochs": epochs}, run="to its end", nodes=nodes)
    assert rows_of(toy, "stopped") == rows_of(toy, "to its end")
    assert other.outcomes["student"] == result.outcomes["student"]
    for name in ("last", "best"):
        assert largest_difference(parameters(toy, "stopped", name), parameters(toy, "to its end", name)) == 0


def test_scores_of_the_next_stretch_are_asked_for_while_this_one_trains(toy, federate):
    _, grid, _ = federate(SMALL)
    kinds = [message.metadata.message_type.partition(".")[2] for message, _ in grid.seen]
    first = kinds.index("distil")
    assert kinds[first - 2 : first] == ["score", "score"]  # the first stretch
    assert kinds[first : first + 3] == ["distil", "score", "score"]  # pulled together
