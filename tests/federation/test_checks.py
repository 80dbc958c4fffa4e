"""No reply is believed unchecked: every kind of wrong answer ends the run with a reason and is never used."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from ckd_fed.config import resolve
from ckd_fed.errors import ReplyError
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.wire import Reply, Stamp
from server.checks import check_fit, check_worker

QUICK = {
    "dataset": "toy",
    "model.embedding-dim": 4,
    "training.epochs": 4,
    "training.validate-every": 2,
    "training.batch-size": 16,
    "training.threads": 1,
    "distillation.batch-size": 20,
    "federation.reply-timeout": 1,
    "federation.retry-limit": 1,
}


@pytest.fixture
def refused(tmp_path, write_dataset, federate):
    """Run with the replies to one action changed; return the reason for which the run ended."""
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=30)

    def run(action, change):
        def tamper(message, reply):
            return change(message, reply) if message.metadata.message_type.endswith(f".{action}") else reply

        with pytest.raises(ReplyError) as caught:
            federate(QUICK, tamper=tamper)
        text = str(caught.value)
        assert "\n" not in text
        return text

    return run


def edit(record, **changes):
    """A change of some entries of a reply's record; ``None`` removes one."""

    def change(message, reply):
        entries = dict(reply.content[record])
        for name, value in changes.items():
            entries[name.replace("_", "-")] = value
            if value is None:
                del entries[name.replace("_", "-")]
        kind = {"reply": ConfigRecord, "metrics": MetricRecord, "arrays": ArrayRecord}[record]
        reply.content[record] = kind(entries)
        return reply

    return change


def array(name, make):
    """Replace an array of a reply by a function of it."""

    def change(message, reply):
        old = reply.content["arrays"][name]
        new = make(np.frombuffer(old.data, dtype=old.dtype).reshape(old.shape))
        if isinstance(new, np.ndarray):
            new = Array(dtype=new.dtype.str, shape=new.shape, stype="raw", data=new.tobytes())
        reply.content["arrays"] = ArrayRecord({**dict(reply.content["arrays"]), name: new})
        return reply

    return change


def twice_as_many_rows(reply):
    reply.content["metrics"] = MetricRecord({name: [*column, *column] for name, column in reply.content["metrics"].items()})
    return reply


def poison(values):
    values = values.copy()
    values.flat[3] = np.nan
    return values


@pytest.mark.parametrize("action", ["fit", "test", "score", "distil", "evaluate"])
@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (edit("reply", run="another"), "run 'another' instead of 'fed-000001'"),
        (edit("reply", round=77), "round 77 instead of"),
        (edit("reply", role="teacher/audio"), "role 'teacher/audio' instead of"),
        (edit("reply", action="enrol"), "action 'enrol' instead of"),
        (edit("reply", protocol=99), "wire protocol"),
        (edit("reply", error="the disk is full"), "the disk is full"),
        (lambda message, reply: None, "no reply to"),
        (lambda message, reply: Message(RecordDict(), reply_to=message), "not of this framework's form"),
        (lambda message, reply: Message(RecordDict({"reply": MetricRecord({"a": 1.0})}), reply_to=message), "not of this framework's form"),
        (lambda message, reply: Message(Error(2, "Traceback\nValueError: boom"), reply_to=message), "ValueError: boom"),
    ],
)
def test_answers_to_something_else(action, change, mention, refused):
    assert mention in refused(action, change)


@pytest.mark.parametrize(
    ("action", "change", "mention"),
    [
        ("score", array("margins/0", poison), "1 NaN or infinite entries"),
        ("score", array("margins/0", lambda a: a[:-1]), "is needed"),
        ("score", array("margins/0", lambda a: a.astype("<f4")), "float32"),
        ("score", array("margins/0", lambda a: Array(dtype="<f2", shape=a.shape, stype="raw", data=a.tobytes()[:-2])), "does not fit"),
        ("score", array("margins/0", lambda a: Array(dtype="<f2", shape=(-1, -a.size), stype="raw", data=a.tobytes())), "does not fit"),
        ("score", array("margins/0", lambda a: Array(dtype="|O", shape=a.shape, stype="numpy.ndarray", data=a.tobytes())), "'|O'"),
        ("score", edit("reply", hashes=None), "one for each of 1 workers"),
        ("score", edit("reply", hashes=["a", "b"]), "one for each of 1 workers"),
        ("distil", array("weights/user_embedding", poison), "not finite"),
        ("distil", array("weights/user_embedding", lambda a: a[:-1]), "shape"),
        ("distil", array("weights/user_embedding", lambda a: a.astype("<f2")), "float16"),
        ("distil", lambda message, reply: edit("arrays", **{"weights/another": Array(np.zeros(1, dtype="<f4"))})(message, reply), "another"),
        ("distil", edit("reply", epoch=3), "stopped at epoch 3"),
        ("distil", edit("reply", samples=1), "its share is"),
        ("distil", edit("metrics", **{"val/recall@20": [float("nan")]}), "val/recall@20"),
        ("distil", edit("metrics", **{"val/recall@20": [1.5]}), "between 0 and 1"),
        ("distil", edit("metrics", **{"val/recall@20": 0.5}), "lists of one length"),
        ("distil", edit("metrics", gain=[0.0]), "has gain 0, its recall@20 says 1"),
        ("distil", edit("metrics", epoch=[1.0]), "validations are of epochs [1.0], those due are [2]"),
        ("distil", lambda message, reply: twice_as_many_rows(reply), "those due are [2]"),
        ("distil", edit("metrics", **{"val/recall@20": None}), "'val/recall@20' is missing"),
        ("distil", edit("metrics", **{"effect/image": [11.0]}), "effect of image is 11.0"),
        ("distil", edit("metrics", **{"weight/image": [1.5]}), "do not sum"),
        ("distil", edit("metrics", **{"weight/image": [2.5]}), "weight of image is 2.5"),
        ("evaluate", array("users", lambda a: a[::-1].copy()), "not ascending"),
        ("evaluate", array("users", lambda a: a - 1), "not ascending"),
        ("evaluate", array("users", lambda a: a + 1000), "at most"),
        ("test", array("user/recall@20", lambda a: 1 - a), "have the mean"),
        ("test", array("user/ndcg@10", lambda a: a[:-1]), "is needed"),
        ("test", edit("reply", groups="[1]"), "groups of users"),
        (
            "test",
            edit("reply", groups='[{"model": "teacher/text", "kind": "users", "group": "1 items", "n": Infinity}]'),
            "infinity",
        ),
        ("test", edit("reply", groups="[" * 10_000 + "]" * 10_000), "nested too deeply"),
        ("test", edit("reply", holds="[" * 10_000 + "]" * 10_000), "nested too deeply"),
        ("test", edit("reply", groups="[]"), "not of users and of items"),
        ("test", edit("reply", groups='[{"model": "teacher/text", "kind": "users", "group": "<b>", "n": 1, "recall@20": 0.5}]'), "none of teacher"),
        ("test", edit("reply", groups='[{"model": "student", "kind": "users", "group": "1 items", "n": 1, "recall@20": 0.5}]'), "none of teacher"),
        ("test", edit("reply", n_users=0), "n-users is 0, it was asked about"),
        ("evaluate", edit("reply", n_users=0), "n-users is 0, it was asked about"),
        ("fit", edit("reply", epoch=0), "epoch"),
        ("fit", edit("reply", epoch=500), "epoch 500"),
        ("fit", edit("reply", best_epoch=3), "the epoch of its best is 3; its last gain is at epoch"),
        ("fit", edit("reply", done=False), "stopped at epoch 4 without having converged"),
        ("fit", edit("metrics", gain=[7.0, 0.0]), "its gains are [7.0, 0.0]"),
        ("fit", edit("metrics", gain=[0.0, 0.0]), "the epoch of its best is"),
        ("fit", edit("metrics", epoch=[0.1, 4.0]), "validations are of epochs [0.1, 4.0]; those due are [2, 4]"),
        ("fit", edit("reply", done=1), "true or false"),
        ("fit", edit("metrics", **{"val/recall@20": [0.5]}), "lists of one length"),
        ("fit", edit("metrics", **{"val/recall@20": [float("inf"), 0.1]}), "finite"),
        ("test", edit("metrics", **{"recall@20": None}), "'recall@20' is missing"),
        ("test", edit("metrics", **{"ndcg@10": -0.1}), "between 0 and 1"),
        ("evaluate", edit("reply", n_users=-1), "n-users"),
        ("fit", edit("reply", holds=None), "does not say what it was made with"),
        ("fit", edit("reply", holds="[1]"), "holds cannot be read"),
        ("fit", edit("reply", holds='{"code": 1, "split": "", "features": {}}'), "the node says that it holds"),
        ("fit", edit("reply", holds='{"code": "c", "split": "s", "features": {}}'), "another code and other split and other"),
        ("evaluate", edit("metrics", **{"sum/recall@20": 1e9}), "between 0 and 1"),
    ],
)
def test_wrong_contents(action, change, mention, refused):
    if action == "distil" and ("shape" in mention or "another" in mention):
        change = second_time(change)  # what the student's parameters are is known from its first reply
    assert mention in refused(action, change)


def second_time(change):
    """Change a worker's replies from the second on."""
    calls = []

    def later(message, reply):
        calls.append(reply)
        return reply if len(calls) == 1 else change(message, reply)

    return later


def test_a_student_refuses_margins_of_other_triples(refused):
    """Both teachers agree on the wrong triples (another seed, say): the student, which derives its own, notices."""
    assert "belong to other triples" in refused("score", edit("reply", hashes=["f" * 64]))


def test_teachers_that_answer_for_different_triples(refused):
    def one(message, reply):
        return edit("reply", hashes=["f" * 64])(message, reply) if message.content["request"]["role"] == "teacher/text" else reply

    assert "teachers image and text answered for different triples" in refused("score", one)


@pytest.mark.parametrize(("retries", "bad"), [(1, 1), (2, 2), (0, 1), (1, 2)])
def test_every_answer_of_teachers_that_disagreed_counts(retries, bad, tmp_path, write_dataset, federate):
    """As many tries as ``federation.retry-limit`` allows beyond the first, and none whose answer nobody looks at."""
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=30)
    asked = []

    def tamper(message, reply):
        if message.metadata.message_type.endswith(".score") and message.content["request"]["role"] == "teacher/text":
            asked.append(message)
            return edit("reply", hashes=["f" * 64])(message, reply) if len(asked) <= bad else reply
        return reply

    run = lambda: federate({**QUICK, "federation.retry-limit": retries}, tamper=tamper)  # noqa: E731
    if bad <= retries:
        assert run()[0].outcomes["student"].test
        assert len(asked) > bad
    else:
        with pytest.raises(ReplyError, match="answered for different triples"):
            run()
        assert len(asked) == bad


def test_a_reply_of_an_earlier_round_is_not_used(refused):
    kept = []

    def replay(message, reply):
        kept.append(reply)
        if len(kept) < 3:
            return reply
        old = kept[0]
        return Message(old.content, reply_to=message)

    assert "instead of" in refused("score", replay)


@pytest.mark.parametrize(
    ("gains", "best", "done", "fine"),
    [
        ([0, 0], 40, False, True),  # the server knew of a best at 45: another node trained it again, to rounding
        ([1, 0], 55, False, True),
        ([0, 1], 60, True, True),
        ([0], 45, True, True),
        ([0], 45, False, False),
        ([1, 0], 60, False, False),
        ([0, 0], 55, False, False),
        ([0, 0, 0], 45, False, False),
    ],
)
def test_a_teachers_early_stopping_is_its_own(gains, best, done, fine):
    config = resolve({"dataset": "toy", "federation.teacher-epochs": 10, "training.validate-every": 5}, {})
    rows = {"epoch": [55.0 + 5 * n for n in range(len(gains))], "gain": [float(g) for g in gains], "loss/total": [0.1] * len(gains)}
    rows["val/recall@20"] = [0.08] * len(gains)
    values = {"epoch": 50 + 5 * len(gains), "best-epoch": best, "done": done}
    reply = Reply(Stamp("r", "fit", 3, "teacher/text", "0"), values, rows, {}, 0, 0.0, None)
    if fine:
        assert check_fit(reply, config, 50).best_epoch == best
    else:
        with pytest.raises(ReplyError):
            check_fit(reply, config, 50)


def test_parameters_of_a_best_validation_are_those_of_the_same_model():
    config = resolve({"dataset": "toy", "training.validate-every": 5, "training.batch-size": 8}, {})
    table = np.ones((3, 2), dtype=np.float32)
    rows = {"epoch": [5.0, 10.0], "gain": [1.0, 0.0], "val/recall@20": [0.2, 0.1]}
    values = {"epoch": 10, "samples": 10 * 4 * 8, "fresh-optimizer": False}

    def checked(best):
        arrays = {
            name: Array(dtype="<f4", shape=one.shape, stype="raw", data=one.tobytes()) for name, one in {"weights/t": table, "best/t": best}.items()
        }
        reply = Reply(Stamp("r", "distil", 3, "student/0", "0"), values, rows, arrays, 0, 0.0, None)
        return check_worker(reply, config, before=0, epochs=10, steps=4, required=[], taught=[], like=None, stopping=EarlyStopping(10))

    np.testing.assert_array_equal(checked(2 * table).best["t"], 2 * table)
    with pytest.raises(ReplyError, match="shape"):
        checked(table[:2])
