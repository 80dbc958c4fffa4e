"""A run that was killed anywhere goes on to the result of the undisturbed one, bit for bit."""

import json
import random
import shutil

import numpy as np
import pytest
from flwr.app import Error, Message

from ckd_fed.checkpoint import load_checkpoint, load_state, save_checkpoint
from ckd_fed.errors import ConfigError, DataError, EnrolmentError, ReplyError
from ckd_fed.tracking.record import Record, read_rows
from clients import node as client_node
from server import checkpoints, rounds

SMALL = {
    "dataset": "toy",
    "model.embedding-dim": 4,
    "training.batch-size": 32,
    "training.epochs": 12,
    "training.validate-every": 3,
    "training.learning-rate": 0.01,
    "training.threads": 1,
    "distillation.batch-size": 40,
    "distillation.rho": 1.0,
    "federation.teacher-epochs": 6,
    "federation.messaging-share": 1,
    "plain": True,
}


class Killed(BaseException):
    """Stands for kill -9 of the ServerApp."""


@pytest.fixture
def toy(tmp_path, write_dataset):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40)
    return tmp_path


@pytest.fixture
def kill(federate, monkeypatch):
    """Run until a message, then stop as if killed: nothing is written any more, and no process remembers anything."""

    def run(overrides, point, *, answered, run, nodes=None):
        seen = []

        def tamper(message, reply):
            seen.append(message)
            if len(seen) == point + 1:
                raise Killed
            return reply

        def push(self, messages):
            if len(seen) >= point and not answered:
                raise Killed
            return original(self, messages)

        grid_class = type(federate.grid())
        original = grid_class.push_messages
        with monkeypatch.context() as patch:
            patch.setattr(Record, "fail", lambda self, reason: self.close())
            patch.setattr(grid_class, "push_messages", push)
            with pytest.raises(Killed):
                federate(overrides, run=run, tamper=tamper, nodes=nodes)
        client_node._FITS.clear()

    return run


def numbers(home, run):
    """Rows of a run without what differs from process to process."""
    rows = read_rows(home / "runs" / run / "metrics.jsonl")
    kept = [row for row in rows if row["event"] in ("round", "validation", "final")]
    return [{k: v for k, v in row.items() if k != "time" and "seconds" not in k and not k.startswith("bytes")} for row in kept]


def same(home, run, reference):
    assert numbers(home, run) == numbers(home, reference)
    for name in ("best", "last"):
        ours, theirs = (load_checkpoint(home / "runs" / r / "checkpoints" / f"{name}.safetensors")[0] for r in (run, reference))
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_anywhere_and_resumed(workers, toy, federate, kill):
    """Both when the nodes have answered (and are a round ahead of the server) and when they never got the message."""
    # How long the rounds of a lone student grow goes by the clock; from its second round on (0) they always grow.
    overrides = {**SMALL, "federation.student-workers": workers, "plain": workers == 1, "federation.messaging-share": 0}
    nodes = [{"partition-id": i, "num-partitions": 2 + workers} for i in range(2 + workers)]
    _, grid, _ = federate(overrides, run="undisturbed", nodes=nodes)
    before_the_end = [message for message, _ in grid.seen if not message.metadata.message_type.endswith(".forget")]
    points = range(len(nodes) + 1, len(before_the_end) - 1)  # after enrolment, the run's first checkpoint
    draw = random.Random(workers)
    for index, point in enumerate(draw.sample(points, 10 if workers == 1 else 4)):
        kill(overrides, point, answered=index % 2 == 0, run=f"run{index}", nodes=nodes)
        federate({"resume": f"run{index}", "name": ""}, nodes=nodes)
        same(toy, f"run{index}", "undisturbed")
        assert load_state(toy / "runs" / f"run{index}" / "checkpoints" / "state.safetensors")["phase"] == "finished"


def test_killed_over_and_over(toy, federate, kill):
    federate(SMALL, run="undisturbed")
    kill(SMALL, 6, answered=True, run="run")
    for point in (4, 5, 6):
        kill({"resume": "run", "name": ""}, point, answered=point % 2 == 0, run="run")
    federate({"resume": "run", "name": ""})
    same(toy, "run", "undisturbed")
    assert [row["event"] for row in read_rows(toy / "runs/run/metrics.jsonl")].count("resume") >= 2


def test_a_row_cut_short_by_the_crash_is_written_again(toy, federate, kill):
    federate(SMALL, run="undisturbed")
    kill(SMALL, 9, answered=True, run="run")
    with (toy / "runs/run/metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "round", "round": 3, "lo')
    federate({"resume": "run", "name": ""})
    same(toy, "run", "undisturbed")


def test_a_node_that_lost_its_workspace_trains_up_to_the_same_teacher(toy, federate, kill):
    federate(SMALL, run="undisturbed")
    kill(SMALL, 14, answered=True, run="run")
    assert load_state(toy / "runs/run/checkpoints/state.safetensors")["phase"] == "distillation"
    shutil.rmtree(toy / "workspace/run-000001/teacher-text")
    federate({"resume": "run", "name": ""})
    same(toy, "run", "undisturbed")


def test_a_student_that_lost_its_workspace_is_said_to_start_its_optimiser_anew(toy, federate, kill):
    kill(SMALL, 21, answered=True, run="run")
    shutil.rmtree(toy / "workspace/run-000001/student-0")
    lines = []
    result, _, _ = federate({"resume": "run", "name": ""}, write=lines.append)
    assert [line for line in lines if "student/0 had no workspace" in line and "optimiser started anew" in line]
    assert result.outcomes["student"].test


def test_a_run_is_not_gone_on_with_on_other_features(toy, federate, kill, refuses):
    kill(SMALL, 12, answered=True, run="run")
    path = toy / "data/toy/text_feat.npy"
    features = np.load(path)
    np.save(path, features + 1)
    refuses(EnrolmentError, lambda: federate({"resume": "run", "name": ""}), "another features of", "text")
    np.save(path, features)
    federate({"resume": "run", "name": ""})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_workspace_is_set_aside_and_counts_as_lost(toy, federate, kill, keep, capsys):
    federate(SMALL, run="undisturbed")
    kill(SMALL, 14, answered=True, run="run")
    state = toy / "workspace/run-000001/teacher-text/state.safetensors"
    cut(state)
    federate({"resume": "run", "name": ""})
    same(toy, "run", "undisturbed")
    assert state.with_name("state.safetensors.damaged").is_file()
    assert [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line and "set aside as state.safetensors.damaged" in line]


def test_a_students_damaged_states_are_set_aside_both(toy, federate, kill, keep):
    kill(SMALL, 21, answered=True, run="run")
    folder = toy / "workspace/run-000001/student-0"
    for name in ("state", "previous"):
        cut(folder / f"{name}.safetensors")
    lines = []
    result, _, _ = federate({"resume": "run", "name": ""}, write=lines.append)
    assert [line for line in lines if "student/0 had no workspace" in line]
    assert result.outcomes["student"].test
    assert {path.name for path in folder.glob("*.damaged")} == {"state.safetensors.damaged", "previous.safetensors.damaged"}


def test_a_name_that_is_used_again_finds_no_old_workspace(toy, federate, kill):
    kill({**SMALL, "seed": 1}, 9, answered=True, run="run")
    shutil.rmtree(toy / "runs/run")
    federate({**SMALL, "seed": 2}, run="run")
    federate({**SMALL, "seed": 2}, run="undisturbed")
    same(toy, "run", "undisturbed")


def test_what_cannot_be_resumed(toy, federate, kill, refuses):
    refuses(ConfigError, lambda: federate({"resume": "nothing"}), "no run 'nothing'", "runs there: none")
    kill(SMALL, 12, answered=True, run="run")
    resume = {"resume": "run", "name": ""}
    refuses(
        ConfigError, lambda: federate({**resume, "training.epochs": 13}), "training.epochs is 13 here", "'run' has 12", "leave training.epochs out"
    )
    refuses(  # as an app gives it that sets another dataset than its run was started with
        ConfigError, lambda: federate({**resume, "dataset": "baby", "seed": 5}), "dataset is 'baby' here",
        "-c 'resume=\"run\" dataset=\"toy\" seed=123'",
    )  # fmt: skip
    refuses(ConfigError, lambda: federate({**resume, "federation.student-workers": 2}), "federation.student-workers is 2 here")
    refuses(ConfigError, lambda: federate({**resume, "federation.stretch-mb": 32.0}), "federation.stretch-mb is 32.0 here", "'run' has 64.0")
    refuses(ConfigError, lambda: federate({**resume, "name": "other"}), "name is 'other' here")
    federate({**resume, "training.epochs": 12, "federation.retry-limit": 7})  # repeated, and changed where nothing depends on it
    refuses(ConfigError, lambda: federate(resume), "'run' is finished")


def test_the_students_that_lie_there_are_those_of_the_state(toy, federate, kill):
    """The server died between writing a round's student and writing the round down; the round is done again and may gain nothing then."""
    kill(SMALL, 19, answered=True, run="run")
    state = checkpoints.load_state(toy / "runs/run")
    folder = toy / "runs/run/checkpoints"
    for name in ("best", "last"):
        arrays, values = load_checkpoint(folder / f"{name}.safetensors")
        save_checkpoint(folder / f"{name}.safetensors", {key: array + 1 for key, array in arrays.items()}, values)
    kill({"resume": "run", "name": ""}, 2, answered=False, run="run")
    for name, parameters in (("best", state.best), ("last", state.last)):
        arrays, _ = load_checkpoint(folder / f"{name}.safetensors")
        assert arrays.keys() == parameters.keys()
        assert all(np.array_equal(arrays[key], parameters[key]) for key in arrays)


@pytest.mark.parametrize("full", ["for a moment", "for good"])
def test_a_full_disk_of_the_server_is_told_with_how_to_go_on(full, toy, federate, monkeypatch):
    federate(SMALL, run="undisturbed")
    saved, real_save, real_row, lines = [], rounds.save_state, Record.row, []

    def save(directory, state):
        saved.append(state)
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        real_save(directory, state)

    def row(self, event, **values):
        if event == "failed" and full == "for good":
            raise OSError(28, "No space left on device, still")
        real_row(self, event, **values)

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "save_state", save)
        patch.setattr(Record, "row", row)
        with pytest.raises(OSError, match=r"No space left on device$"):
            federate(SMALL, run="run", write=lines.append)
    assert any("No space left" in line and 'resume="run"' in line for line in lines)
    client_node._FITS.clear()
    federate({"resume": "run", "name": ""})
    same(toy, "run", "undisturbed")


def test_a_damaged_or_foreign_checkpoint_is_refused(toy, federate, kill, refuses):
    kill(SMALL, 12, answered=True, run="run")
    path = toy / "runs/run/checkpoints/state.safetensors"
    whole = path.read_bytes()
    arrays, state = load_checkpoint(path)
    resume = {"resume": "run", "name": ""}
    for content, mention in {whole[: len(whole) // 2]: "damaged", b"": "damaged", whole[:9] + b"x" + whole[10:]: "damaged"}.items():
        path.write_bytes(content)
        refuses(DataError, lambda: federate(resume), "state.safetensors", mention)
    for change, mention in {"version": 99, "stopping": {"patience": 1}, "number": None}.items():
        changed = {**state, change: mention}
        if mention is None:
            del changed[change], changed["run"]
        save_checkpoint(path, arrays, changed)
        refuses(DataError, lambda: federate(resume), "state.safetensors")
    save_checkpoint(path, arrays, {**state, "code": "0.0.1+12345678"})
    refuses(EnrolmentError, lambda: federate(resume), "another code", "0.0.1+12345678")
    path.write_bytes(whole)
    metrics = toy / "runs/run/metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:50])
    refuses(DataError, lambda: federate(resume), "metrics.jsonl", "cannot be resumed")


def test_two_processes_cannot_write_one_run(toy, federate, kill, refuses):
    from ckd_fed.tracking.record import sole_writer

    kill(SMALL, 12, answered=True, run="run")
    with sole_writer(toy / "runs/run"):
        refuses(ConfigError, lambda: federate({"resume": "run", "name": ""}), "another process is writing")
    federate({"resume": "run", "name": ""})


def states(toy):
    return list((toy / "workspace").rglob("*.safetensors*"))


def test_a_finished_run_leaves_no_workspaces_but_what_the_teachers_wrote_down(toy, federate, refuses):
    def fail(message, reply):
        return Message(Error(2, "boom"), reply_to=message) if message.metadata.message_type == "query.test" else reply

    refuses(ReplyError, lambda: federate({**SMALL, "federation.retry-limit": 0}, run="failed", tamper=fail), "boom")
    assert states(toy)
    federate(SMALL, run="run")
    assert all("failed-000001" in path.parts for path in states(toy))
    assert {path.name for path in (toy / "runs/run/checkpoints").iterdir()} == {"best.safetensors", "last.safetensors", "state.safetensors"}
    given = [path for path in toy.rglob("*.jsonl") if "run-000001" in str(path)]
    assert len(given) == 2
    assert all(any(row.get("new") for row in read_rows(path)) for path in given)


@pytest.mark.parametrize("fault", ["refused", "gone"])
def test_a_node_that_does_not_delete_its_workspace_changes_nothing(fault, toy, federate, monkeypatch):
    grid_class, lines = type(federate.grid()), []
    push = grid_class.push_messages

    def fail(self, messages):
        if messages[0].metadata.message_type == "query.forget":
            raise ConnectionError("the SuperLink is gone")
        return push(self, messages)

    def refuse(self, run):
        raise OSError("read-only file system")

    if fault == "gone":
        monkeypatch.setattr(grid_class, "push_messages", fail)
    else:
        monkeypatch.setattr(client_node.Node, "forget", refuse)
    result, _, _ = federate(SMALL, run="run", write=lines.append)
    assert result.outcomes["student"].test
    assert load_state(toy / "runs/run/checkpoints/state.safetensors")["phase"] == "finished"
    said = "the SuperLink is gone" if fault == "gone" else "read-only file system"
    assert len([line for line in lines if "may keep its workspace/run-000001" in line and said in line]) == 2


def test_a_server_app_that_flower_ends_says_so_and_how_to_go_on(toy, federate):
    """Flower raises SystemExit(0) in it where the SuperLink does not know it any more."""
    lines = []

    def end(message, reply):
        if message.metadata.message_type == "query.score":
            raise SystemExit(0)
        return reply

    with pytest.raises(SystemExit):
        federate(SMALL, run="run", tamper=end, write=lines.append)
    assert read_rows(toy / "runs/run/metrics.jsonl")[-1]["reason"].startswith("Flower ended the ServerApp")
    assert any("no sign of life" in line and 'resume="run"' in line for line in lines)
    result, _, _ = federate({"resume": "run", "name": ""})
    assert result.outcomes["student"].test


def test_every_round_is_checkpointed(toy, federate):
    """The checkpoint accounts for every row and holds all that the run arrived at."""
    states = []

    def look(message, reply):
        path = toy / "runs/fed/checkpoints/state.safetensors"
        if path.is_file():
            state = load_state(path)
            rows = (toy / "runs/fed/metrics.jsonl").read_bytes()
            last = [json.loads(line) for line in rows[: state["recorded"]].splitlines() if json.loads(line)["event"] == "round"]
            assert state["number"] == (last[-1]["round"] if last else 0)
            states.append((state["phase"], state["number"]))
        return reply

    federate(SMALL, tamper=look)
    assert list(dict.fromkeys(states)) == [
        ("teachers", 0), ("teachers", 1), ("teachers", 2), ("distillation", 2), ("distillation", 3), ("distillation", 4), ("distillation", 5),
        ("distillation", 6), ("finished", 6),
    ]  # fmt: skip
