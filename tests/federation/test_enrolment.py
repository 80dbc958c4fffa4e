"""Enrolment names whatever is missing, doubled or different."""

import json
import time
from dataclasses import asdict, replace

import pytest
from flwr.app import Error, Message
from loopback import LoopbackGrid

from ckd_fed.config import resolve
from ckd_fed.errors import ConfigError, EnrolmentError, ReplyError
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.wire import NodeCard, Reply, Stamp, read_card
from server.checkpoints import RunState
from server.enrolment import assign, different_features, enrol
from server.exchange import Exchange

CARD = NodeCard(
    role="", modality="", partition=-1, partitions=0, code="0.1.0+aaaaaaaa", split="s" * 64, n_users=10, n_items=20, n_train=3000,
    n_val_users=9, n_test_users=8,
    modalities="image,text", features=json.dumps({"image": "i", "text": "t"}), dataset="toy",
    standin=False, counterfactual=True, device="cpu", host="here", held="{}",
)  # fmt: skip


def teacher(modality, **changes):
    return replace(CARD, role="teacher", modality=modality, modalities=modality, features=json.dumps({modality: modality[0]}), **changes)


def student(**changes):
    return replace(CARD, role="student", **changes)


def simulated(n):
    return {100 + index: replace(CARD, partition=index, partitions=n) for index in range(n)}


def config(**overrides):
    return resolve({"dataset": "toy"}, overrides)


def test_real_nodes_take_the_roles_of_their_node_config():
    plan, missing = assign(config(), {5: teacher("text"), 6: student(), 7: teacher("image")})
    assert missing == ""
    assert dict(plan.teachers) == {"image": 7, "text": 5}
    assert plan.students == (6,)
    assert plan.spare == ()
    assert different_features(plan) == []
    assert [line.split()[0:2] for line in plan.describe()] == [["teacher", "image"], ["teacher", "text"], ["student", "node"]]


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        ({"host": "gpu (cpu)\n  teacher text       node 4711 on trusted.example"}, "its card has host = 'gpu (cpu)\\n"),
        ({"host": "\x1b[2Kgpu"}, "host"),
        ({"host": "h" * 5_000_000}, "host"),
        ({"role": "student\r"}, "role"),
        ({"dataset": "d" * 1001}, "dataset"),
        ({"n_train": -100_000}, "-100000 interactions"),
        ({"n_train": 0}, "0 interactions"),
        ({"n_items": 10**30}, "items"),
        ({"n_users": True}, "n_users"),
        ({"n_test_users": 11}, "11 to test, of 10"),
        ({"n_val_users": 0}, "0 users to validate"),
    ],
)
def test_a_card_that_no_node_has_is_not_believed(change, mention, refuses):
    """What it says of its host is printed in the plan, and its sizes decide steps and shapes."""
    stamp = Stamp("r", "enrol", 0, "node/4", "0")
    answer = lambda card: Reply(stamp, {"card": json.dumps(asdict(card))}, {}, {}, 0, 0.0, None)  # noqa: E731
    assert read_card(answer(CARD)) == CARD
    raised = refuses(ReplyError, lambda: read_card(answer(replace(CARD, **change))), mention)
    assert len(str(raised)) < 400


def test_a_node_that_takes_any_role_is_none_among_those_that_have_one(refuses):
    """In a simulation all nodes take any; such a one beside real teachers would be dealt all of the roles."""
    cards = {5: teacher("text"), 6: student(), 7: teacher("image"), 8: replace(CARD, partition=0, partitions=1)}
    refuses(EnrolmentError, lambda: assign(config(), cards), "node 8", "any role", "node 5", "stop one of them")


def test_the_same_split_has_the_same_sizes(refuses):
    cards = {5: teacher("text", n_train=2999), 6: student(), 7: teacher("image")}
    refuses(EnrolmentError, lambda: assign(config(), cards), "node 5", "node 6", "different sizes of the same split")


def test_a_teacher_and_the_students_must_agree_on_which_items_have_its_modality(refuses):
    masked = json.dumps({"text": "t+abc"})
    cards = {5: replace(teacher("text"), features=masked), 6: student(), 7: teacher("image")}
    refuses(EnrolmentError, lambda: assign(config(), cards), "node 5", "node 6", "which items have text", "text_mask.npy")
    both = student(features=json.dumps({"image": "i", "text": "other+abc"}))
    plan, missing = assign(config(), {**cards, 6: both})
    assert missing == ""
    assert not plan.whole
    assert different_features(plan) == ["text"]
    plan, _ = assign(config(), {5: teacher("text"), 6: student(), 7: teacher("image")})
    assert plan.whole


@pytest.mark.parametrize(
    ("cards", "missing"),
    [
        ({5: teacher("text"), 6: student()}, "the teacher of image is missing"),
        ({6: student()}, "the teacher of image and of text is missing"),
        ({5: teacher("text"), 7: teacher("image")}, "a student node is missing"),
    ],
)
def test_what_is_missing_is_named_and_may_still_come(cards, missing):
    plan, said = assign(config(), cards)
    assert plan is None
    assert missing in said


@pytest.mark.parametrize(
    ("cards", "mentions"),
    [
        (
            {5: teacher("text"), 6: student(), 7: replace(teacher("text", host="there"), features=json.dumps({"text": "other"}))},
            ["'text' has two teachers with different features", "node 5 on here", "node 7 on there"],
        ),
        ({5: teacher("audio"), 6: student()}, ["teacher audio (node 5 on here)", "unknown modality 'audio'", "choices: image, text"]),
        ({5: teacher("text", split="x" * 64), 6: student()}, ["different splits", "xxxxxxxxxxxx", "ssssssssssss", "train.json"]),
        ({5: teacher("text", code="0.2.0+bbbbbbbb"), 6: student()}, ["different code", "0.2.0+bbbbbbbb", "0.1.0+aaaaaaaa"]),
        ({5: student(), 6: student(modalities="image,text,audio")}, ["different modalities", "image,text,audio"]),
        ({5: student(), 6: student(features=json.dumps({"image": "i", "text": "other"}))}, ["different features of text", "node 5", "node 6"]),
        ({5: student(), 6: student(features=json.dumps({"image": "i+abc", "text": "t"}))}, ["different masks of image", "node 5", "node 6"]),
    ],
)
def test_what_waiting_cannot_mend_fails_at_once(cards, mentions):
    with pytest.raises(EnrolmentError) as caught:
        assign(config(), cards)
    message = str(caught.value)
    assert "\n" not in message
    for mention in mentions:
        assert mention in message


@pytest.mark.parametrize("cards", [{5: teacher("text"), 6: student(), 7: teacher("image")}, simulated(3)])
def test_settings_that_cannot_come_true_fail_before_anybody_trains(cards, refuses):
    refuses(ConfigError, lambda: assign(config(**{"data.missing": "audoi:0.3"}), cards), "data.missing", "unknown modality 'audoi'", "image, text")
    assert assign(config(**{"data.missing": "text:0.3"}), cards)[0]


@pytest.mark.parametrize("name", ["clip+bert", "a,b", "a@b", "my text", "values"])
@pytest.mark.parametrize("role", ["student", ""])
def test_a_modality_whose_name_cannot_be_used_is_refused(name, role, refuses):
    card = replace(CARD, role=role, partitions=1, modalities=f"image,{name}", features=json.dumps({"image": "i", name: "t"}))
    refuses(EnrolmentError, lambda: assign(config(), {5: card}), repr(name), "rename its file", "on every node")


@pytest.mark.parametrize("features", ["", "[1]", '{"text": 1}'])
def test_a_card_whose_fingerprints_are_none_is_not_believed(features, refuses):
    said = json.dumps(asdict(student(features=features)))
    answer = Reply(Stamp("run", "enrol", 0, "node/5", "n"), {"card": said}, {}, {}, 0, 0.0, None)
    refuses(ReplyError, lambda: read_card(answer), "its card has features", repr(features))


def test_a_second_teacher_of_a_modality_is_its_hot_spare():
    plan, _ = assign(config(), {5: teacher("text"), 6: student(), 7: teacher("image"), 8: teacher("text", host="there")})
    assert dict(plan.teachers) == {"image": 7, "text": 5}
    assert plan.spare == (8,)
    assert "spare teacher text node 8 on there" in " ".join(plan.describe()[-1].split())


@pytest.mark.parametrize(
    "given_up",
    [
        replace(teacher("text"), features=json.dumps({"text": "replaced"})), replace(teacher("text"), features=json.dumps({"text": "t+mask"})),
        teacher("text", split="x" * 64), teacher("text", code="0.2.0+bbbbbbbb"),
    ],
)  # fmt: skip
def test_a_teacher_that_was_given_up_is_in_nobodys_way(given_up):
    """In a run that is gone on with, its node may well be connected still, with whatever it was given up for."""
    cards = {4: teacher("text"), 5: given_up, 6: student(), 7: teacher("image")}
    plan, _ = assign(config(), cards, ["text"])
    assert dict(plan.teachers) == {"image": 7}
    assert plan.spare == (4, 5)
    assert "teacher/text" not in plan.features()
    with pytest.raises(EnrolmentError):
        assign(config(), cards)
    assert assign(config(), {5: given_up}, ["text"])[1].startswith("a student node is missing")


def test_in_a_resumed_run_everybody_is_what_he_was():
    cards = {
        1: student(held=json.dumps({"student/1": 20, "plain": 5})), 2: student(), 3: student(held=json.dumps({"student/0": 20})),
        5: teacher("text"), 6: teacher("text", held=json.dumps({"teacher/text": 50})), 7: teacher("image"),
    }  # fmt: skip
    plan, _ = assign(config(**{"federation.student-workers": 2}), cards)
    assert plan.students == (3, 1)
    assert plan.spare == (2, 5)
    assert plan.teachers["text"] == 6


def test_as_many_student_nodes_as_configured_are_waited_for():
    cards = {5: teacher("text"), 6: student(), 7: teacher("image")}
    plan, missing = assign(config(**{"federation.student-workers": 2}), cards)
    assert plan is None
    assert "1 of 2 student nodes (federation.student-workers) are missing" in missing


def test_a_dropped_teacher_is_not_waited_for():
    plan, _ = assign(config(), {5: teacher("text"), 6: student()}, ["image"])
    assert dict(plan.teachers) == {"text": 5}


def test_a_teacher_with_other_features_than_the_student_is_pointed_out():
    plan, _ = assign(config(), {5: replace(teacher("text"), features=json.dumps({"text": "better"})), 6: student(), 7: teacher("image")})
    assert different_features(plan) == ["text"]


@pytest.mark.parametrize(
    ("nodes", "workers", "teachers", "students", "spare"),
    [
        (1, 1, {"image": 100, "text": 100}, (100,), ()),
        (2, 1, {"image": 100, "text": 101}, (100,), ()),
        (3, 1, {"image": 100, "text": 101}, (102,), ()),
        (5, 1, {"image": 100, "text": 101}, (102,), (103, 104)),
        (5, 2, {"image": 100, "text": 101}, (102, 103), (104,)),
        (2, 3, {"image": 100, "text": 101}, (100, 101, 100), ()),
        (4, 3, {"image": 100, "text": 101}, (102, 103, 100), ()),
        (1, 2, {"image": 100, "text": 100}, (100, 100), ()),
    ],
)
def test_roles_are_dealt_to_simulated_nodes(nodes, workers, teachers, students, spare):
    plan, _ = assign(config(**{"federation.student-workers": workers}), simulated(nodes))
    assert (dict(plan.teachers), plan.students, plan.spare) == (teachers, students, spare)


def test_simulated_nodes_are_waited_for():
    cards = simulated(3)
    cards.pop(101)
    plan, missing = assign(config(), cards)
    assert plan is None
    assert "1 of 3 simulated nodes are missing" in missing


def test_nobody_comes(federate, refuses):
    refuses(EnrolmentError, lambda: federate({"dataset": "toy"}, nodes={}), "no node has connected", "nodes there: none")


def test_no_data(federate, refuses):
    refuses(EnrolmentError, lambda: federate({"dataset": "toy"}), "unknown dataset 'toy'", "baby")


def test_the_deadline_names_who_is_missing_and_who_is_there(tmp_path, write_dataset, federate, refuses):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy")
    nodes = [{"role": "student"}, {"role": "teacher", "modality": "text"}]
    refuses(
        EnrolmentError,
        lambda: federate({"dataset": "toy"}, nodes=nodes),
        "the teacher of image is missing",
        "enrol-timeout",
        "teacher text",
        "student",
    )


@pytest.mark.parametrize(
    ("node", "mentions"),
    [
        ({}, ["no role", "node-config"]),
        ({"role": "pupil"}, ["unknown role 'pupil'", "student, teacher"]),
        ({"role": "teacher"}, ["a teacher needs its modality"]),
        ({"role": "teacher", "modality": "smell"}, ["unknown modality 'smell'", "image, text"]),
        ({"role": "student", "data-dir": "/nowhere/at/all"}, ["/nowhere/at/all", "does not exist"]),
        ({"role": "student", "device": "cuda:99"}, ["cuda:99", "GPUs"]),
    ],
)
def test_a_node_that_cannot_take_part_says_why(node, mentions, tmp_path, write_dataset, federate, refuses):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy")
    refuses(EnrolmentError, lambda: federate({"dataset": "toy"}, nodes=[node]), *mentions)


def test_a_node_that_is_lost_at_enrolment_may_come_back(tmp_path, write_dataset, federate):
    """As after the kill of a node whose id is still listed: Flower reports it gone, a minute later it is there again."""
    (tmp_path / "data").mkdir()
    write_dataset("data/toy")
    nodes = [{"role": "student"}, {"role": "teacher", "modality": "text"}, {"role": "teacher", "modality": "image"}]
    lost = []

    def tamper(message, reply):
        if message.metadata.message_type == "query.enrol" and message.metadata.dst_node_id == 1002 and len(lost) < 2:
            lost.append(message)
            return Message(Error(5, "the node is unavailable"), reply_to=message)
        return reply

    lines = []
    overrides = {"dataset": "toy", "training.epochs": 1, "training.batch-size": 16, "distillation.batch-size": 20, "federation.enrol-timeout": 10}
    result, _, _ = federate(overrides, nodes=nodes, tamper=tamper, write=lines.append)
    assert result.outcomes["student"].test
    assert len([line for line in lines if "node 1002 was lost at enrolment" in line]) == 2


class Slow(LoopbackGrid):
    """Nodes that come, and that answer, only some seconds after the first look."""

    def __init__(self, node_configs, comes=None, answers=None):
        super().__init__(node_configs)
        self.comes, self.answers = comes or {}, answers or {}
        self.started = None

    def _over(self, node, times):
        self.started = self.started or time.monotonic()
        return time.monotonic() - self.started >= times.get(node, 0)

    def get_node_ids(self):
        return [node for node in self.node_configs if self._over(node, self.comes)]

    def pull_messages(self, message_ids):
        due = [key for key in message_ids if self._over(self._waiting[key].metadata.dst_node_id, self.answers)]
        return super().pull_messages(due)


NEVER = 1e6
TRIO = [{"role": "student"}, {"role": "teacher", "modality": "text"}, {"role": "teacher", "modality": "image"}]


@pytest.fixture
def introduce(tmp_path, write_dataset):
    """Enrol the nodes of a grid; returns the plan and the lines."""
    (tmp_path / "data").mkdir()
    write_dataset("data/toy")

    def run(grid, state=None, **overrides):
        lines = []
        chosen = config(home=str(tmp_path), **{"federation.enrol-timeout": 2, "federation.node-timeout": 10, **overrides})
        return enrol(Exchange(grid, "run", chosen), lines.append, state), lines

    return run


def begun(**changes):
    """The state of a run to go on with."""
    return RunState("run", CARD.code, CARD.split, {}, ("image", "text"), 1, EarlyStopping(2), **changes)


def test_a_silent_node_holds_up_nobody_else(introduce):
    """The others come while it is asked already, and it is not needed."""
    plan, lines = introduce(Slow([{"role": "student"}, *TRIO], comes={1002: 0.3, 1003: 0.3, 1004: 0.3}, answers={1001: NEVER}))
    assert plan.students == (1002,)
    assert dict(plan.teachers) == {"image": 1004, "text": 1003}
    assert [line for line in lines if "going on without" in line and "node 1001" in line]


def test_a_silent_node_that_is_needed_is_named(introduce, refuses):
    grid = Slow(TRIO, answers={1001: NEVER})
    message = refuses(
        EnrolmentError, lambda: introduce(grid, **{"federation.enrol-timeout": 0.5}), "enrol-timeout", "a student node is missing", "teacher text",
        "no answer yet (perhaps still busy with an earlier request): node 1001",
    )  # fmt: skip
    assert "node 1002," not in message
    refuses(
        EnrolmentError, lambda: introduce(Slow(TRIO, answers=dict.fromkeys((1001, 1002, 1003), NEVER)), **{"federation.enrol-timeout": 0.5}),
        "no node has answered", "node 1001, node 1002, node 1003",
    )  # fmt: skip


def test_a_resumed_run_waits_longer_for_a_node_that_is_still_busy(introduce, refuses):
    slow = {"federation.enrol-timeout": 0.3}
    refuses(EnrolmentError, lambda: introduce(Slow(TRIO, answers={1001: 1}), **slow), "a student node is missing")
    plan, lines = introduce(Slow(TRIO, answers={1001: 1}), begun(), **slow)
    assert plan.students == (1001,)
    assert [line for line in lines if "federation.node-timeout" in line and "node 1001" in line]
    refuses(
        EnrolmentError, lambda: introduce(Slow(TRIO, answers={1001: NEVER}), begun(), **slow, **{"federation.node-timeout": 0.6}),
        "federation.node-timeout", "node 1001",
    )  # fmt: skip
    refuses(EnrolmentError, lambda: introduce(Slow(TRIO[1:]), begun(), **slow), "enrol-timeout", "a student node is missing")


def test_a_resumed_run_prefers_who_played_the_role_to_who_answers_first(introduce, tmp_path, monkeypatch):
    monkeypatch.setattr("clients.node.held_roles", lambda root, run: {"student/0": 20} if "first" in str(root) else {})
    grid = Slow([{"role": "student", "home": str(tmp_path / "first"), "data-dir": str(tmp_path / "data/toy")}, *TRIO], answers={1001: 0.5})
    plan, _ = introduce(grid, begun())
    assert plan.students == (1001,)
    assert plan.spare == (1002,)


def test_two_nodes_with_different_splits(tmp_path, write_dataset, federate, refuses):
    one, other = write_dataset("one"), write_dataset("other", seed=1)
    nodes = [{"role": "student", "data-dir": str(one)}, {"role": "teacher", "modality": "text", "data-dir": str(other)}]
    refuses(EnrolmentError, lambda: federate({"dataset": "toy"}, nodes=nodes), "different splits")


def test_a_teacher_node_needs_no_other_modality_on_its_disk(tmp_path, write_dataset, federate, keep):
    folders = {}
    for role, keep in {"image": {"image"}, "text": {"text"}, "student": {"image", "text"}}.items():
        folders[role] = write_dataset(role, n_users=30)
        for path in folders[role].glob("*_feat.npy"):
            if path.name.removesuffix("_feat.npy") not in keep:
                path.unlink()
    nodes = [
        {"role": "teacher", "modality": "image", "data-dir": str(folders["image"]), "home": str(tmp_path / "a")},
        {"role": "student", "data-dir": str(folders["student"]), "home": str(tmp_path / "b")},
        {"role": "teacher", "modality": "text", "data-dir": str(folders["text"]), "home": str(tmp_path / "c")},
    ]
    quick = {"training.epochs": 2, "training.validate-every": 1, "training.batch-size": 16, "distillation.batch-size": 20}
    result, _, federation = federate({"dataset": "toy", **quick}, nodes=nodes)
    assert set(result.outcomes) == {"teacher/image", "teacher/text", "student"}
    assert dict(federation.rounds.plan.teachers) == {"image": 1001, "text": 1003}
    for home, role in {"a": "teacher-image", "b": "student-0", "c": "teacher-text"}.items():
        assert (tmp_path / home / "workspace" / "fed-000001" / role / "state.safetensors").is_file()
