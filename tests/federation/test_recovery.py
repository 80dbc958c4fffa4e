"""Nodes that fail, vanish, come back or are replaced: no round is lost, and what cannot be mended is handled as configured."""

import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message
from loopback import LoopbackGrid

from ckd_fed.checkpoint import load_checkpoint, load_state
from ckd_fed.errors import EnrolmentError, ReplyError
from ckd_fed.tracking.record import read_rows
from ckd_fed.training.fit import Fit
from clients import node as client_node
from server import students

SMALL = {
    "dataset": "toy",
    "model.embedding-dim": 4,
    "training.batch-size": 32,
    "training.epochs": 9,
    "training.validate-every": 3,
    "training.learning-rate": 0.01,
    "training.threads": 1,
    "distillation.batch-size": 40,
    "distillation.rho": 1.0,
    "federation.teacher-epochs": 6,
    "federation.reply-timeout": 5,
    "federation.node-timeout": 0.3,
}


@pytest.fixture
def homes(tmp_path, write_dataset):
    """Node-configs of real nodes, each with a home and data of its own that hold what its role may have."""

    def build(*roles, n_modalities=2):
        folders = {}
        for index, role in enumerate(roles):
            name = f"{role}-{index}"
            folders[name] = write_dataset(name, n_users=60, n_items=40, n_modalities=n_modalities)
            for path in folders[name].glob("*_feat.npy"):
                if role not in ("student", path.name.removesuffix("_feat.npy")):
                    path.unlink()
        return [
            {
                **({"role": "student"} if name.startswith("student") else {"role": "teacher", "modality": name.partition("-")[0]}),
                "data-dir": str(folder),
                "home": str(tmp_path / "home" / name),
            }
            for name, folder in folders.items()
        ]

    return build


def weights(home, run, name="last"):
    return load_checkpoint(home / "runs" / run / "checkpoints" / f"{name}.safetensors")[0]


def equal(home, run, reference):
    ours, theirs = weights(home, run), weights(home, reference)
    assert ours.keys() == theirs.keys()
    return all(np.array_equal(ours[key], theirs[key]) for key in ours)


def kind(message):
    return message.metadata.message_type.partition(".")[2]


def times(n, change, when):
    """Change the first n replies for which ``when`` holds."""
    left = [n]

    def tamper(message, reply):
        if left[0] and when(message):
            left[0] -= 1
            return change(message, reply)
        return reply

    return tamper


def garbage(message, reply):
    for record in list(reply.content):
        if record != "reply":
            del reply.content[record]
    return reply


FAULTS = {
    "raised": lambda message, reply: Message(Error(2, "RuntimeError: boom"), reply_to=message),
    "gone": lambda message, reply: Message(Error(5, "the node is unavailable"), reply_to=message),
    "garbage": garbage,
    "lost": lambda message, reply: None,
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_request_that_failed_is_sent_again(fault, tmp_path, homes, federate):
    nodes = homes("image", "text", "student")
    federate(SMALL, nodes=nodes, run="undisturbed")
    overrides = {**SMALL, "federation.reply-timeout": 1} if fault == "lost" else SMALL
    for action in ("fit", "test", "score", "distil", "evaluate"):
        lines = []
        federate(
            overrides, nodes=nodes, run=f"{fault}-{action}", tamper=times(2, FAULTS[fault], lambda m, a=action: kind(m) == a), write=lines.append
        )
        assert equal(tmp_path, f"{fault}-{action}", "undisturbed"), action
        assert len([line for line in lines if "trying again" in line]) == 2
        state = load_state(tmp_path / "runs" / f"{fault}-{action}" / "checkpoints" / "state.safetensors")
        assert state["totals"]["retries"] == (2 if action in ("fit", "score", "distil") else 0)  # tests are in no round


def leave_at(grid_class, node_configs, when, change, absent_for=0):
    """A grid where a node is gone once ``when(message)`` holds; ``change(configs)`` is what the nodes are after ``absent_for`` looks."""

    class Grid(grid_class):
        gone = None
        looks = 0

        def get_node_ids(self):
            if self.gone:
                self.looks += 1
                if self.looks == absent_for + 1:
                    change(self.node_configs)
            return [node for node in self.node_configs if node != self.gone]

        def pull_messages(self, message_ids):
            replies, rest = [], []
            for message_id in message_ids:
                message = self._waiting.get(message_id)
                if message and (message.metadata.dst_node_id == self.gone or (self.gone is None and when(message))):
                    self.gone = message.metadata.dst_node_id
                    del self._waiting[message_id]
                    replies.append(Message(Error(5, "the node is unavailable"), reply_to=message))
                else:
                    rest.append(message_id)
            return replies + super().pull_messages(rest)

    return Grid(node_configs)


@pytest.mark.parametrize("action", ["fit", "test", "score"])
def test_a_teacher_comes_back_under_another_id(action, tmp_path, homes, federate):
    nodes = homes("image", "text", "student")
    federate(SMALL, nodes=nodes, run="undisturbed")
    grid = leave_at(
        type(federate.grid()),
        nodes,
        lambda m: kind(m) == action and m.content["request"]["role"] == "teacher/text",
        lambda configs: configs.update({77: configs[1002]}),
    )
    lines = []
    _, _, federation = federate(SMALL, nodes=grid, run="back", write=lines.append)
    assert federation.rounds.roster.nodes["teacher/text"] == 77
    assert [line for line in lines if "teacher/text: teacher text (node 77" in line and "takes over" in line]
    assert equal(tmp_path, "back", "undisturbed")


@pytest.mark.parametrize("action", ["fit", "test", "score"])
def test_a_hot_spare_takes_over_with_the_same_margins(action, tmp_path, homes, federate, keep):
    """It has never trained; from the same data, seed and code it arrives at the same teacher."""
    nodes = homes("image", "text", "student", "text")
    federate(SMALL, nodes=nodes, run="undisturbed")
    seen = []

    def when(message):
        seen.append(message)
        return kind(message) == action and message.content["request"]["role"] == "teacher/text" and len(seen) > 8

    client_node._FITS.clear()
    grid = leave_at(type(federate.grid()), nodes, when, lambda configs: None)
    _, _, federation = federate({**SMALL, "federation.teacher-epochs": 3}, nodes=grid, run="spare")
    assert federation.rounds.roster.nodes["teacher/text"] == 1004
    assert (tmp_path / "home/text-3/workspace/spare-000001/teacher-text/state.safetensors").is_file()
    federate({**SMALL, "federation.teacher-epochs": 3}, nodes=nodes, run="reference")
    assert equal(tmp_path, "spare", "reference")


def test_a_node_that_keeps_failing_makes_room_for_its_spare(homes, federate):
    nodes = homes("image", "text", "student", "text")

    def full_disk(message, reply):
        return FAULTS["raised"](message, reply) if message.metadata.dst_node_id == 1002 and kind(message) == "score" else reply

    _, _, federation = federate(SMALL, nodes=nodes, tamper=full_disk)
    assert federation.rounds.roster.nodes["teacher/text"] == 1004


def test_a_newcomer_with_other_data_does_not_take_over(tmp_path, homes, write_dataset, federate):
    nodes = homes("image", "text", "student")
    other = write_dataset("other", n_users=60, n_items=40, seed=5)
    grid = leave_at(
        type(federate.grid()),
        nodes,
        lambda m: kind(m) == "score" and m.content["request"]["role"] == "teacher/text",
        lambda configs: configs.update({77: {**nodes[1], "data-dir": str(other), "home": str(tmp_path / "home/other")}}),
    )
    lines = []
    with pytest.raises(ReplyError) as caught:
        federate(SMALL, nodes=grid, write=lines.append)
    assert "did not come back within" in str(caught.value)
    assert "resume=" in str(caught.value)
    assert [line for line in lines if "cannot take part: it holds another split" in line]


def test_a_silent_newcomer_holds_up_nobody_else(homes, federate):
    nodes = homes("image", "text", "student")
    grid = leave_at(
        type(federate.grid()),
        nodes,
        lambda m: kind(m) == "score" and m.content["request"]["role"] == "teacher/text",
        lambda configs: configs.update({76: {}, 77: configs[1002]}),
    )
    answering = grid.pull_messages
    grid.pull_messages = lambda keys: answering([key for key in keys if grid._waiting[key].metadata.dst_node_id != 76])
    started = time.monotonic()
    _, _, federation = federate(SMALL, nodes=grid)
    assert federation.rounds.roster.nodes["teacher/text"] == 77
    assert time.monotonic() - started < 80


def gone_for_good(federate, nodes, role, action="score"):
    return leave_at(type(federate.grid()), nodes, lambda m: kind(m) == action and m.content["request"]["role"] == role, lambda configs: None)


@pytest.mark.parametrize("action", ["fit", "score"])
def test_drop_goes_on_with_the_others(action, tmp_path, homes, federate):
    nodes = homes("image", "text", "audio", "student", n_modalities=3)
    lines = []
    overrides = {**SMALL, "data.modalities": "image,text,audio", "federation.on-lost-teacher": "drop"}
    result, _, federation = federate(overrides, nodes=gone_for_good(federate, nodes, "teacher/text", action), run="run", write=lines.append)
    assert federation.rounds.teachers == ["image", "audio"]
    assert [line for line in lines if line.startswith("!! teacher text is DROPPED")]
    assert result.outcomes["student"].test
    rows = read_rows(tmp_path / "runs/run/metrics.jsonl")
    assert [row["modality"] for row in rows if row["event"] == "dropped"] == ["text"]
    last = [row for row in rows if row["event"] == "round" and row["phase"] == "distillation"][-1]
    assert "weight/text" not in last
    assert last["weight/image"] + last["weight/audio"] == pytest.approx(2)
    assert load_state(tmp_path / "runs/run/checkpoints/state.safetensors")["dropped"].keys() == {"text"}


def test_a_run_is_gone_on_with_though_a_teacher_that_was_dropped_is_still_connected(homes, federate):
    """Its features were replaced, for which it was dropped; then the server dies, and the node waits for the next run."""
    nodes, replaced = homes("image", "text", "audio", "student", n_modalities=3), []

    def tamper(message, reply):
        action = message.metadata.message_type.partition(".")[2]
        if action == "fit" and message.content["request"]["role"] == "teacher/text" and not replaced:
            replaced.append(Path(nodes[1]["data-dir"]) / "text_feat.npy")
            np.save(replaced[0], np.load(replaced[0]) + 1)
        if action == "distil" and message.content["request"]["from-epoch"] >= 3:
            raise KeyboardInterrupt
        return reply

    overrides = {**SMALL, "data.modalities": "image,text,audio", "federation.on-lost-teacher": "drop"}
    with pytest.raises(KeyboardInterrupt):
        federate(overrides, nodes=LoopbackGrid(nodes, tamper), run="run")
    lines = []
    result, _, federation = federate({"resume": "run", "federation.on-lost-teacher": "drop"}, nodes=nodes, write=lines.append)
    assert federation.rounds.teachers == ["image", "audio"]
    assert result.outcomes["student"].test
    assert any("spare teacher text" in " ".join(line.split()) for line in lines)


@pytest.mark.parametrize("action", ["fit", "score"])
def test_a_run_is_gone_on_with_though_its_teacher_is_gone_for_good(action, tmp_path, homes, federate, refuses):
    nodes = homes("image", "text", "student")
    refuses(ReplyError, lambda: federate(SMALL, nodes=gone_for_good(federate, nodes, "teacher/text", action), run="run"), 'resume="run"')
    resume = {"resume": "run", "federation.on-lost-teacher": "drop"}
    left = [nodes[0], nodes[2]]
    refuses(EnrolmentError, lambda: federate({"resume": "run"}, nodes=left), "the teacher of text is missing", 'on-lost-teacher="drop"')
    refuses(EnrolmentError, lambda: federate(resume, nodes=[nodes[2]]), "the teacher of image and of text is missing")
    refuses(EnrolmentError, lambda: federate({**SMALL, "federation.on-lost-teacher": "drop"}, nodes=left, run="new"), "the teacher of text")
    lines = []
    result, _, federation = federate(resume, nodes=left, write=lines.append)
    assert federation.rounds.teachers == ["image"]
    assert result.outcomes["student"].test
    assert [line for line in lines if line.startswith("!! teacher text is DROPPED") and "the teacher of text is missing" in line]
    rows = read_rows(tmp_path / "runs/run/metrics.jsonl")
    assert [row["modality"] for row in rows if row["event"] == "dropped"] == ["text"]
    last = [row for row in rows if row["event"] == "round" and row["phase"] == "distillation"][-1]
    assert "weight/text" not in last
    assert load_state(tmp_path / "runs/run/checkpoints/state.safetensors")["dropped"].keys() == {"text"}


def test_the_last_teacher_is_not_dropped(homes, federate, refuses):
    nodes = homes("image", "text", "student")
    overrides = {**SMALL, "federation.on-lost-teacher": "drop"}
    lost = ("teacher/image", "teacher/text")

    def tamper(message, reply):
        return FAULTS["gone"](message, reply) if kind(message) == "score" and message.content["request"]["role"] in lost else reply

    refuses(ReplyError, lambda: federate(overrides, nodes=nodes, tamper=tamper), "the last teacher is lost")


def test_wait_waits_beyond_the_limits(tmp_path, homes, federate):
    nodes = homes("image", "text", "student")
    federate(SMALL, nodes=nodes, run="undisturbed")
    lines = []
    overrides = {**SMALL, "federation.on-lost-teacher": "wait", "federation.retry-limit": 1}
    flaky = times(5, FAULTS["raised"], lambda m: kind(m) == "score" and m.content["request"]["role"] == "teacher/text")
    federate(overrides, nodes=nodes, run="waited", tamper=flaky, write=lines.append)
    assert [line for line in lines if "waiting on for teacher/text" in line]
    assert equal(tmp_path, "waited", "undisturbed")


def test_a_lost_student_ends_the_run_with_how_to_go_on(homes, federate, refuses):
    nodes = homes("image", "text", "student")
    lost = gone_for_good(federate, nodes, "student/0", "distil")
    refuses(ReplyError, lambda: federate({**SMALL, "federation.on-lost-teacher": "drop"}, nodes=lost), "did not come back", 'resume="fed"')


def test_a_spare_student_takes_over(homes, federate):
    nodes = homes("image", "text", "student", "student")
    seen = []

    def when(message):
        seen.extend([message] if kind(message) == "distil" else [])
        return kind(message) == "distil" and len(seen) > 1

    lines = []
    grid = leave_at(type(federate.grid()), nodes, when, lambda configs: None)
    _, _, federation = federate(SMALL, nodes=grid, write=lines.append)
    assert federation.rounds.roster.nodes["student/0"] == 1004
    assert [line for line in lines if "optimiser started anew" in line]


def test_a_spare_student_with_other_features_does_not_take_over(tmp_path, homes, write_dataset, federate, refuses):
    nodes = homes("image", "text", "student")
    other = write_dataset("other", n_users=60, n_items=40)
    np.save(other / "text_feat.npy", np.load(other / "text_feat.npy") + 1)
    grid = leave_at(
        type(federate.grid()),
        nodes,
        lambda m: kind(m) == "distil",
        lambda configs: configs.update({77: {**nodes[2], "data-dir": str(other), "home": str(tmp_path / "home/other")}}),
    )
    lines = []
    refuses(ReplyError, lambda: federate(SMALL, nodes=grid, write=lines.append), "did not come back within")
    assert [line for line in lines if "node 77" in line and "cannot take part: the run's students have different features of text" in line]


def test_a_failure_that_would_come_again_is_not_tried_again(homes, federate, refuses):
    """Nor does the error say that resuming would help."""
    nodes = homes("image", "text", "student")
    lines = []
    overrides = {**SMALL, "training.learning-rate": 1e30, "federation.on-lost-teacher": "wait"}
    message = refuses(ReplyError, lambda: federate(overrides, nodes=nodes, write=lines.append), "lower training.learning-rate")
    assert "resume" not in message
    assert not [line for line in lines if "trying again" in line]


def test_requests_live_as_long_as_their_answer_is_waited_for(homes, federate):
    """Not half a day, as they do in Flower by default: neither shorter than federation.reply-timeout nor for nobody."""
    _, grid, _ = federate({**SMALL, "federation.reply-timeout": 100_000, "federation.enrol-timeout": 30}, nodes=homes("image", "text", "student"))
    lives = {(kind(message) == "enrol", round(message.metadata.ttl, -1)) for message, _ in grid.seen if kind(message) != "forget"}
    assert lives == {(True, 30), (False, 100_000)}


def replaced(nodes, index, when, folder):
    """A grid where a node, still the same id, has another data folder from the first message on for which ``when`` holds."""

    class Grid(LoopbackGrid):
        def push_messages(self, messages):
            if any(when(message) for message in messages):
                self.node_configs[1001 + index] = {**nodes[index], "data-dir": str(folder)}
            return super().push_messages(messages)

    return Grid(nodes)


@pytest.mark.parametrize(("index", "role", "action"), [(1, "teacher/text", "score"), (1, "teacher/text", "fit"), (2, "student/0", "evaluate")])
def test_a_node_whose_features_were_replaced_between_two_rounds(index, role, action, homes, write_dataset, federate, refuses):
    """Its id is the same and it says nothing; what it did with them is not used."""
    nodes = homes("image", "text", "student")
    other = write_dataset("other", n_users=60, n_items=40)
    np.save(other / "text_feat.npy", np.load(other / "text_feat.npy") + 1)
    grid = replaced(nodes, index, lambda m: kind(m) == action and m.content["request"]["role"] == role, other)
    lines = []
    refuses(ReplyError, lambda: federate(SMALL, nodes=grid, write=lines.append), "it was made with another text features", f"node {1001 + index} on")
    assert [line for line in lines if "cannot take part" in line and "text" in line]


def test_a_node_whose_features_were_replaced_makes_room_for_its_spare(tmp_path, homes, write_dataset, federate):
    nodes = homes("image", "text", "student", "text")
    federate(SMALL, nodes=nodes, run="undisturbed")
    other = write_dataset("other", n_users=60, n_items=40)
    np.save(other / "text_feat.npy", np.load(other / "text_feat.npy") + 1)
    grid = replaced(nodes, 1, lambda m: kind(m) == "score", other)
    _, _, federation = federate(SMALL, nodes=grid, run="run")
    assert federation.rounds.roster.nodes["teacher/text"] == 1004
    assert equal(tmp_path, "run", "undisturbed")


def test_a_node_whose_code_was_replaced(homes, federate, refuses, monkeypatch):
    nodes = homes("image", "text", "student")

    def update(message, reply):
        if kind(message) == "score":
            monkeypatch.setattr(client_node, "code_version", lambda: "0.2.0+bbbbbbbb")
        return reply

    lines = []
    refuses(ReplyError, lambda: federate(SMALL, nodes=nodes, tamper=update, write=lines.append), "it was made with another code")
    assert [line for line in lines if "cannot take part: it runs other code, 0.2.0+bbbbbbbb" in line]


def test_a_node_that_was_mended_while_it_was_away_may_take_part(tmp_path, homes, write_dataset, federate):
    """It came with other data first, under the id that it still has."""
    nodes = homes("image", "text", "student")
    other = write_dataset("other", n_users=60, n_items=40, seed=5)

    class Grid(LoopbackGrid):
        looks = 0

        def get_node_ids(self):
            if 77 in self.node_configs:
                self.looks += 1
            if self.looks == 3:
                self.node_configs[77] = nodes[1]
            return [node for node in self.node_configs if not (node == 77 and self.looks == 2)]

        def push_messages(self, messages):
            if any(kind(m) == "score" and m.metadata.dst_node_id == 1002 for m in messages) and 1002 in self.node_configs:
                del self.node_configs[1002]
                self.node_configs[77] = {**nodes[1], "data-dir": str(other)}
            return ["" if m.metadata.dst_node_id == 1002 and kind(m) == "score" else self._push(m) for m in messages]

        def _push(self, message):
            return super().push_messages([message])[0]

    lines = []
    _, _, federation = federate({**SMALL, "federation.node-timeout": 20}, nodes=Grid(nodes), write=lines.append)
    assert federation.rounds.roster.nodes["teacher/text"] == 77
    assert [line for line in lines if "node 77" in line and "cannot take part: it holds another split" in line]


def test_a_late_reply_to_an_earlier_request_is_not_used(tmp_path, homes, federate):
    """The first try's answer comes in place of the second's: its nonce gives it away, and the third try counts."""
    nodes = homes("image", "text", "student")
    federate(SMALL, nodes=nodes, run="undisturbed")
    kept = []

    def late(message, reply):
        if kind(message) != "distil" or len(kept) > 1:
            return reply
        kept.append(reply)
        return FAULTS["gone"](message, reply) if len(kept) == 1 else Message(kept[0].content, reply_to=message)

    lines = []
    federate(SMALL, nodes=nodes, run="late", tamper=late, write=lines.append)
    assert [line for line in lines if "bound to something else (nonce" in line]
    assert equal(tmp_path, "late", "undisturbed")


def test_an_answer_given_once_more_is_not_taken_for_a_round_without_work(homes, federate, monkeypatch):
    """Its node worked no time for it; rounds that grew by that would grow without bound."""
    lost, asked, real_grown, real_advance = [], [], students.grown, Fit.advance

    def tamper(message, reply):
        if message.metadata.message_type.endswith(".distil") and not lost:
            lost.append(message)
            return None
        return reply

    def grown(config, validations, held, messaging, seconds):
        asked.append((held, seconds - messaging))
        return real_grown(config, validations, held, messaging, seconds)

    def advance(self, *arguments, **more):
        return [{**row, "seconds": 20.0} for row in real_advance(self, *arguments, **more)]

    monkeypatch.setattr(students, "grown", grown)
    monkeypatch.setattr(Fit, "advance", advance)
    overrides = {**SMALL, "distillation.enabled": False, "training.epochs": 30, "training.patience": 30, "federation.reply-timeout": 1}
    _, _, done = federate(overrides, nodes=LoopbackGrid(homes("student"), tamper))
    assert lost
    assert all(work >= 20 * held for held, work in asked)
    assert done.rounds.state.stretch <= 8


def test_more_students_than_users_to_validate_by(tmp_path, write_dataset, federate):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40)
    nodes = [{"partition-id": n, "num-partitions": 4} for n in range(4)]
    overrides = {**SMALL, "training.validation-users": 1}
    result, _, _ = federate({**overrides, "federation.student-workers": 2}, nodes=nodes)
    assert result.outcomes["student"].test


def test_a_student_of_one_modality_is_refused_before_anybody_trains(homes, federate, refuses):
    overrides = {**SMALL, "data.modalities": "text"}
    refuses(EnrolmentError, lambda: federate(overrides, nodes=homes("text", "student")), "at least 2", "text")
