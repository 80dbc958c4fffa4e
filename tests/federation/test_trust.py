"""What leaves a node, and what a teacher holds the server to."""

import shutil
from functools import partial

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from ckd_fed.checkpoint import load_checkpoint
from ckd_fed.config import resolve
from ckd_fed.data.dataset import load_dataset
from ckd_fed.errors import ReplyError
from ckd_fed.evaluation.metrics import metric_keys
from ckd_fed.tracking.record import read_rows
from ckd_fed.wire import Stamp, content_bytes, draw_nonce, read_reply, request
from clients.actions import handle
from clients.ledger import Ledger

SMALL = {
    "dataset": "toy",
    "model.embedding-dim": 8,
    "training.batch-size": 32,
    "training.epochs": 9,
    "training.validate-every": 3,
    "training.learning-rate": 0.01,
    "training.threads": 1,
    "distillation.batch-size": 40,
    "federation.teacher-epochs": 6,
    "plain": True,
}


@pytest.fixture
def toy(tmp_path, write_dataset):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40)
    return tmp_path


def encodings(values):
    """A run of numbers as bytes, in every form in which it could plausibly travel."""
    forms = [np.ascontiguousarray(values, dtype=kind).tobytes() for kind in ("<f2", "<f4", "<f8", ">f4")]
    return [*forms, ",".join(map(str, values.tolist())).encode(), ", ".join(map(str, values.tolist())).encode()]


def integer_encodings(items):
    forms = [np.asarray(items, dtype=kind).tobytes() for kind in ("<i2", "<i4", "<i8", "<f4")]
    return [*forms, ",".join(map(str, items)).encode(), ", ".join(map(str, items)).encode()]


def secrets(home, run):
    """What must not travel: name -> byte strings any of which would give it away."""
    dataset = load_dataset(home / "data/toy", name="toy")
    found = {}
    for m, matrix in dataset.features.items():
        found[f"features of {m}"] = [form for row in np.asarray(matrix) for form in encodings(row)]
    train = dataset.train
    rows = {user: train.items[train.indptr[user] : train.indptr[user + 1]] for user in range(dataset.n_users)}
    found["interactions"] = [form for items in rows.values() if len(items) >= 4 for form in integer_encodings(items.tolist())]
    for role in ("teacher-image", "teacher-text"):
        arrays, _ = load_checkpoint(home / "workspace" / run / role / "state.safetensors")
        for name, array in arrays.items():
            if array.ndim == 2 and name.startswith(("parameter/", "best/")):
                found[f"{role} {name}"] = [form for row in array for form in encodings(row)]
    return found


def test_no_message_holds_features_interactions_or_a_teachers_parameters(toy, federate, keep):
    """Every message and reply of a run, as the bytes that Flower sends."""
    _, grid, _ = federate(SMALL)
    wire = [message_to_proto(message).SerializeToString() for pair in grid.seen for message in pair]
    assert len(wire) > 20
    everything = b"\0".join(wire)
    hidden = secrets(toy, "fed-000001")
    assert len(hidden) >= 8
    for what, forms in hidden.items():
        assert not any(form in everything for form in forms), what

    # The same search finds what does travel, so it would have found the rest.
    student, _ = load_checkpoint(toy / "runs/fed/checkpoints/last.safetensors")
    assert encodings(student["user_embedding"][0])[1] in everything

    by_user = {"users", *(f"user/{name}" for name in metric_keys((10, 20)))}
    parameters = {f"{kind}/{name}" for kind in ("weights", "best") for name in student}
    allowed = {"score": {"margins/0"}, "distil": parameters, "test": by_user, "evaluate": by_user}
    for message, reply in grid.seen:
        action = message.metadata.message_type.partition(".")[2]
        assert set(reply.content.get("arrays", {})) <= allowed.get(action, set()), action
        sent = {"distil": {"margins/image", "margins/text", *allowed["distil"]}, "evaluate": allowed["distil"]}
        assert set(message.content.get("arrays", {})) <= sent.get(action, set()), action
        assert content_bytes(message) < 2**20


def ask(node_config, overrides, action="score", run="fed-000001", number=9, role="teacher/text", **values):
    """One request to a node, and its checked reply."""
    stamp = Stamp(run, action, number, role, draw_nonce())
    config = resolve({"tracking.wandb": "off", "tracking.report": False, **overrides})
    message = request(stamp, config, 1, **values)
    message.metadata.__dict__["_message_id"] = "m"
    message = message_from_proto(message_to_proto(message))
    return read_reply(handle(message, Context(1, 1, node_config, RecordDict(), {})), stamp)


@pytest.fixture
def teacher(toy, federate, keep):
    """A teacher after a run: (a function that asks it for margins, the rows of its ledger)."""
    _, _, federation = federate(SMALL)
    learner = federation.rounds.state.learners["teacher/text"]
    best = {"best-epoch": learner.best_epoch, "best": learner.best}
    ledger = toy / "answers/teacher-text/fed-000001.jsonl"

    def margins(first=0, epochs=3, node=None, run="fed-000001", role="teacher/text", best=best, **changes):
        overrides = {**SMALL, "home": str(toy), "name": "fed", **changes}
        config = {"role": "teacher", "modality": "text", **(node or {})}
        return ask(config, overrides, run=run, role=role, **{"from-epoch": first, "epochs": epochs, "workers": 1, **best})

    return margins, lambda: read_rows(ledger)


def test_a_request_that_was_given_up_while_the_node_was_busy_is_not_carried_out(toy, refuses):
    overrides = {**SMALL, "home": str(toy)}
    node = {"role": "teacher", "modality": "text"}
    refuses(ReplyError, lambda: ask(node, overrides, "fit", run="late", seconds=-5, **{"from-epoch": 0, "epochs": 3}), "fit", "given up 5 s ago")
    assert not (toy / "workspace/late").exists()


def test_a_teacher_writes_down_what_it_gave(teacher, toy):
    _, ledger = teacher
    agreement, *answers = ledger()
    dataset = load_dataset(toy / "data/toy", name="toy")
    assert agreement["agreement"] == {"split": dataset.fingerprint, "seed": 123, "batch_size": 32, "kd_batch_size": 40, "epochs": 9}
    steps = len(dataset.train) // 32 + 1
    assert [(row["from_epoch"], row["epochs"], row["margins"], row["new"]) for row in answers] == [
        (first, 3, 3 * steps * 72, 3 * steps * 72) for first in (0, 3, 6)
    ]
    assert all(len(row["triples"]) == 1 and len(row["triples"][0]) == 64 for row in answers)


def test_asked_again_nothing_new_is_given(teacher):
    margins, ledger = teacher
    before = len(ledger())
    margins(0, 3)
    assert [row["new"] for row in ledger()[before:]] == [0]


@pytest.mark.parametrize("change", [{"best": {}}, {"distillation.margin-dtype": "float32"}, {"distillation.margin-bound": 0.01}])
def test_other_margins_of_the_same_triples_are_new(change, teacher, toy, refuses):
    """Of the teacher as it was at another epoch, or of more digits: the server's choice, so it counts."""
    margins, ledger = teacher
    given = sum(row.get("new", 0) for row in ledger())
    if "best" in change:
        early = next(row for row in read_rows(toy / "runs/fed/metrics.jsonl") if row.get("teacher/text/epoch") == 3)
        change = {"best": {"best-epoch": 3, "best": early["teacher/text/val/recall@20"]}}
    refuses(ReplyError, lambda: margins(0, 3, node={"score-budget": given}, **change), "score-budget", f"gave {given} margins")
    margins(0, 3, **change)
    assert sum(row.get("new", 0) for row in ledger()) == given + given // 3
    margins(0, 3, **change)  # the same again
    assert sum(row.get("new", 0) for row in ledger()) == given + given // 3


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"seed": 5}, ["other triples", "seed 5 instead of 123"]),
        ({"distillation.batch-size": 41}, ["kd_batch_size 41 instead of 40"]),
        ({"training.batch-size": 33}, ["batch_size 33 instead of 32"]),
        ({"training.epochs": 10}, ["epochs 10 instead of 9"]),
        ({"first": 9}, ["epochs 9 to 11", "this run has 9 epochs"]),
        ({"first": 7}, ["epochs 7 to 9", "this run has 9 epochs"]),
        ({"first": -1}, ["epochs -1 to 1"]),
        ({"epochs": 0}, ["epochs 0 to -1"]),
        ({"epochs": 10**9}, ["this run has 9 epochs"]),
    ],
)
def test_a_teacher_answers_only_for_the_agreed_stream(changes, mentions, teacher, refuses):
    margins, ledger = teacher
    before = ledger()
    refuses(ReplyError, lambda: margins(**changes), *mentions)
    assert ledger() == before


def test_a_teachers_budget_counts_all_its_runs(teacher, refuses):
    margins, ledger = teacher
    given = sum(row.get("new", 0) for row in ledger())
    per_epoch = given // 9
    refuses(
        ReplyError,
        lambda: margins(run="another", node={"score-budget": given + per_epoch}),
        "score-budget",
        f"gave {given} margins",
        str(3 * per_epoch),
    )
    margins(run="another", node={"score-budget": given + 3 * per_epoch})
    margins(run="another", node={"score-budget": given + 3 * per_epoch})  # the same again
    refuses(ReplyError, lambda: margins(3, 3, run="another", node={"score-budget": given + 3 * per_epoch}), "score-budget")
    refuses(ReplyError, lambda: margins(node={"score-budget": "all"}), "score-budget is 'all'")


@pytest.mark.parametrize("change", ["home", "workspaces deleted"])
def test_a_budget_cannot_be_made_to_start_anew(change, teacher, toy, tmp_path, refuses):
    """Not by a run that names another home, nor with the workspaces of the runs that have ended."""
    margins, ledger = teacher
    given = sum(row.get("new", 0) for row in ledger())
    changes = {}
    if change == "home":
        changes["home"] = str(tmp_path / "elsewhere")
    else:
        shutil.rmtree(toy / "workspace")
    refuses(ReplyError, lambda: margins(run="another", node={"score-budget": given}, **changes), "score-budget", f"gave {given} margins")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_or_role_that_is_no_folder_name_is_refused(teacher, refuses):
    margins, _ = teacher
    for name in ("../../elsewhere", "a/b", "..", ".hidden", "", "a\\b", "a\0b"):
        refuses(ReplyError, partial(margins, run=name), "run of a request", "no plain folder name")
    refuses(ReplyError, partial(margins, role=".."), "role of a request", "no plain folder name")


@pytest.mark.parametrize(
    ("node", "roles"),
    [
        ({"role": "teacher", "modality": "text"}, ["student/0", "plain", "teacher/image", "teacher/text/"]),
        ({"role": "student"}, ["teacher/text"]),
    ],
)
def test_a_real_node_plays_its_own_role_only(node, roles, toy, refuses):
    """A teacher that trained as a student, on its modality alone, would send parameters, and margins that are not counted."""
    values = {"from-epoch": 0, "epochs": 3, "workers": 1, "worker": 0, "best-epoch": 3, "best": 0.1, "split": "val", "hashes": "{}"}
    for role in roles:
        for action in ("fit", "score", "distil", "evaluate", "test"):
            asked = partial(ask, node, {**SMALL, "data.modalities": "text"}, action, role=role, **values)
            refuses(ReplyError, asked, "refuses", repr(role))


@pytest.mark.parametrize(
    ("node", "role", "actions"),
    [
        ({"role": "teacher", "modality": "text"}, "teacher/text", ["distil", "evaluate", "enrol", "forget"]),
        ({"role": "student"}, "student/0", ["fit", "score", "test", "enrol", "forget"]),
        ({"role": "student"}, "plain", ["score", "distil", "evaluate"]),
        ({"partition-id": 0, "num-partitions": 1}, "teacher/text", ["distil", "evaluate"]),
    ],
)
def test_a_role_answers_to_its_own_actions_only(node, role, actions, toy, refuses):
    """A teacher that was asked to distil under its own name would train from the first epoch on and send its parameters, uncounted."""
    values = {"from-epoch": 0, "epochs": 3, "workers": 1, "worker": 0, "split": "val", "hashes": "{}", "evaluate": False, "validate": True}
    values.update({"best": 0.0, "best-epoch": 0, "waited": 0})
    for action in actions:
        asked = partial(ask, node, {**SMALL, "home": str(toy)}, action, run="uncounted", role=role, **values)
        refuses(ReplyError, asked, repr(action), repr(role), "refuses")
    assert not (toy / "workspace/uncounted").exists()


def test_margins_are_clipped_to_the_stated_bound(teacher, toy, federate, refuses):
    margins, _ = teacher
    n = SMALL["training.batch-size"] + SMALL["distillation.batch-size"]
    rows = len(load_dataset(toy / "data/toy", name="toy").train) // 32 + 1
    wide = margins().array("margins/0", (3 * rows, n), np.dtype("<f2"), 65504.0)
    bound = float(np.abs(wide).max()) / 2
    clipped = margins(**{"distillation.margin-bound": bound})
    narrow = clipped.array("margins/0", (3 * rows, n), np.dtype("<f2"), bound)
    inside = np.abs(wide) <= bound
    np.testing.assert_array_equal(narrow[inside], wide[inside])
    assert 0 < np.count_nonzero(~inside) < wide.size
    assert np.abs(narrow).max() <= bound
    with pytest.raises(ReplyError, match="margin-bound"):
        clipped.array("margins/0", (3 * rows, n), np.dtype("<f2"), bound / 2)


def test_a_damaged_ledger_line_is_no_way_around(tmp_path):
    """A line cut short by a crash is left out; the agreement before it still holds."""
    agreement = {"split": "s", "seed": 1, "batch_size": 2, "kd_batch_size": 3, "epochs": 4}
    folder = tmp_path / "answers/teacher-text"
    assert Ledger(folder, "run").admit(agreement, 0, 2, 10, "m") == 20
    Ledger(folder, "run").note(from_epoch=0, epochs=2, by="m", margins=20, new=20)
    with (folder / "run.jsonl").open("ab") as file:
        file.write(b'{"from_epoch": 2, "ep')
    assert Ledger(folder, "run").admit(agreement, 1, 2, 10, "m") == 10
    Ledger(folder, "run").note(from_epoch=1, epochs=2, by="m", margins=20, new=10)
    assert Ledger(folder, "run").admit(agreement, 0, 3, 10, "m") == 0
    with pytest.raises(ReplyError, match="other triples"):
        Ledger(folder, "run").admit({**agreement, "seed": 2}, 1, 2, 10, "m")
    (folder / "run.jsonl").write_bytes(b"nothing of the kind\n")
    with pytest.raises(ReplyError, match="damaged"):
        Ledger(folder, "run")
