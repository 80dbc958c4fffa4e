"""What a node does when it is asked: one function per action of the wire."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Context, Message

from ckd_fed.checkpoint import to_arrays, to_tensors
from ckd_fed.data.triples import StepTriples, triples_hash
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.errors import CkdError, ReplyError, TooLittleMemoryError, TrainingError, unknown
from ckd_fed.evaluation.tested import Tested
from ckd_fed.training.build import triple_stream
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.training.fit import Fit
from ckd_fed.training.means import Means
from ckd_fed.training.trainer import Trainer
from ckd_fed.wire import Request, Stamp, margin_dtype, read_request, refusal, reply
from clients.catch_up import best_of, catch_up
from clients.node import Node

Answer = tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]  # values, metrics, arrays


def enrol(request: Request, node: Node) -> Answer:
    """Say who this node is and what it holds."""
    return {"card": json.dumps(asdict(node.card(request.stamp.run)))}, {}, {}


def forget(request: Request, node: Node) -> Answer:
    """Delete what this node keeps of a run that is finished."""
    node.forget(request.stamp.run)
    return {}, {}, {}


def fit(request: Request, node: Node) -> Answer:
    """Train a teacher (or the plain student) for the epochs of a round."""
    run, role, number = request.stamp.run, request.stamp.role, request.stamp.round
    first = int(request.values["from-epoch"])
    model, state = node.fit(run, role)
    if state.get("round") == number and state.get("from_epoch") == first:  # asked again because the answer was lost: the same answer
        rows = state["rows"]
    else:
        model = catch_up(request, node, model, first)
        rows = model.advance(int(request.values["epochs"]))
        node.save(run, role, model, round=number, from_epoch=first, rows=rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    values = {"done": model.done, "epoch": model.epoch, "best-epoch": model.stopping.best_epoch}
    return values, columns, {}


def test(request: Request, node: Node) -> Answer:
    """Test the best of a teacher (or of the plain student, read out as the configuration says)."""
    model = best_of(request, node)
    width = int(model.trainer.joint_tables().users.shape[1])
    tested = model.trainer.test(request.stamp.role, calibrated=request.config.evaluation.calibrate)
    values, arrays = _by_user(request, tested)
    return {"width": width, "n-users": tested.metrics.n_users, **values}, {**tested.metrics.compute(), **tested.chosen}, arrays


def score(request: Request, node: Node) -> Answer:
    """A teacher's margins for a stretch of the stream: a sheet for each student worker, bound to its triples by hash."""
    run, role, config = request.stamp.run, request.stamp.role, request.config
    first, epochs, workers = (int(request.values[name]) for name in ("from-epoch", "epochs", "workers"))
    model = best_of(request, node)
    stream = triple_stream(config, model.trainer.dataset, distillation=True)
    per_epoch = stream.steps_per_epoch * (stream.batch_size + stream.kd_batch_size)
    agreement = {
        "split": model.trainer.dataset.fingerprint,
        "seed": config.seed,
        "batch_size": stream.batch_size,
        "kd_batch_size": stream.kd_batch_size,
        "epochs": config.training.epochs,
    }
    ledger = node.ledger(run, role)
    teacher, dtype, bound = model.trainer.joint_tables(), margin_dtype(config), config.distillation.margin_bound
    by = _answering(model, dtype, bound)
    new = ledger.admit(agreement, first, epochs, per_epoch, by)
    (modality,) = model.trainer.dataset.modalities
    mask = model.trainer.dataset.masks.get(modality)
    sheets, hashes = {}, []
    for worker in range(workers):
        steps = [step for epoch in range(first, first + epochs) for step in stream.epoch(epoch, (worker, workers))]
        sheets[f"margins/{worker}"] = margin_sheet(teacher, steps, dtype, bound, mask)
        hashes.append(triples_hash(steps))
    margins = sum(sheet.size for sheet in sheets.values())
    ledger.note(round=request.stamp.round, from_epoch=first, epochs=epochs, by=by, margins=margins, new=new, triples=hashes)
    return {"hashes": hashes}, {}, sheets


def _answering(teacher: Fit, dtype: np.dtype, bound: float) -> str:
    """Fingerprint of what decides a teacher's margins besides the triples: its best parameters, to how many digits and up to what size."""
    total = hashlib.sha256(f"{dtype.str} {bound!r}".encode())
    for name, array in sorted(to_arrays(teacher.best).items()):
        total.update(name.encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()[:16]


def distil(request: Request, node: Node) -> Answer:
    """Train a student worker's share of a stretch of epochs on the teachers' margins, from the weights that the server sends.

    A lone student validates and stops early by itself, from the state of early stopping that comes with the request; its answer holds a
    row for each validation, its weights, and those of a best validation that is not the last. One of several validates, for a share of the
    users, the weights that it is sent: they are what all of them came to in the round before.
    """
    run, role, number = request.stamp.run, request.stamp.role, request.stamp.round
    share = int(request.values["worker"]), int(request.values["workers"])
    asked = _fingerprint(request)
    weights = to_tensors(request.arrays, "weights/")
    model, state = node.fit(run, role, share, exact=not weights)
    if state.get("round") == number and state.get("asked") == asked:  # asked again because the answer was lost: the same answer
        node.workspace(run, role).load(model)  # an evaluation may have put other weights in
        return state["answer"], state["metrics"], _student(model)
    model, fresh = _at_epoch(request, node, model, share)
    first, last = model.epoch, model.epoch + int(request.values["epochs"])
    if weights:
        model.trainer.restore(weights)
    elif first:
        raise ReplyError(f"{role}: epoch {first} is asked for without weights to go on from")

    steps = {epoch: model.trainer.stream.epoch(epoch, share) for epoch in range(first, last)}
    sheets = _check_sheets(request, [step for epoch in steps.values() for step in epoch])
    per_epoch = len(steps[first])

    def part(epoch: int) -> dict[str, np.ndarray]:
        return {m: sheet[(epoch - first) * per_epoch : (epoch - first + 1) * per_epoch] for m, sheet in sheets.items()}

    metrics: dict[str, Any]
    before: dict[str, Any] = {}  # the validation of these weights
    counted: dict[str, int] = {}
    if request.values["evaluate"]:
        counted, before = _validation(model.trainer, share)
    if request.values["validate"]:
        best, waited = float(request.values["best"]), int(request.values["waited"])
        model.stopping = EarlyStopping(request.config.training.patience, best, int(request.values["best-epoch"]), waited)
        model.best = {}
        rows = model.advance(last - first, sheets=(lambda _: part(model.epoch)) if sheets else None)
        metrics = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    else:
        means = Means()
        for epoch in range(first, last):
            model.trainer.train_epoch(epoch, part(epoch) if sheets else None, steps[epoch], means)
            model.epoch += 1
        metrics = {**means.compute(), **means.asked(), **before}
    samples = (model.epoch - first) * per_epoch * request.config.training.batch_size
    answer = {"samples": samples, "epoch": model.epoch, "fresh-optimizer": fresh, **counted}
    ahead = state.get("epoch") != int(request.values["from-epoch"])  # done again: the state before this round is kept already
    node.save(run, role, model, keep_previous=not ahead, round=number, asked=asked, answer=answer, metrics=metrics)
    return answer, metrics, _student(model)


def _student(model: Fit) -> dict[str, np.ndarray]:
    """A student's parameters for the wire, and its best ones where those are others."""
    best = model.best if model.stopping.best_epoch != model.epoch else {}
    return {**to_arrays(model.trainer.snapshot(), "weights/"), **to_arrays(best, "best/")}


def evaluate(request: Request, node: Node) -> Answer:
    """Rank a share of the users with the weights that the server sends; the answer holds sums, to be merged with other workers'."""
    worker, workers = int(request.values["worker"]), int(request.values["workers"])
    model, state = node.fit(request.stamp.run, request.stamp.role, (worker, workers), exact=False)
    model.trainer.restore(to_tensors(request.arrays, "weights/"))
    node.keep(request.stamp.run, request.stamp.role, model, state)
    if request.values["split"] == "val":
        return *_validation(model.trainer, (worker, workers)), {}
    tested = model.trainer.test("student", (worker, workers), calibrated=request.config.evaluation.calibrate)
    values, arrays = _by_user(request, tested)
    sums = {f"sum/{name}": total for name, total in tested.metrics.sums.items()}
    return {"n-users": tested.metrics.n_users, **values}, {**sums, **tested.chosen}, arrays


def _validation(trainer: Trainer, share: tuple[int, int]) -> tuple[dict[str, int], dict[str, float]]:
    """A share of the users validated: how many they are, and sums over them."""
    metrics = trainer.diagnose(trainer.validation, share)
    return {"n-users": metrics.n_users}, {f"sum/{name}": total for name, total in metrics.sums.items()}


def _by_user(request: Request, tested: Tested) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A test by groups, and user by user unless the run is to do without: values and arrays of the answer."""
    values = {"groups": json.dumps(tested.by_user.groups)}
    if not request.config.evaluation.user_table:
        return values, {}
    arrays = {f"user/{name}": column for name, column in tested.by_user.values.items()}
    return values, {"users": tested.by_user.users.astype(np.int32), **arrays}


# Each action with the roles that it is for, by how their names begin: a teacher that was asked to distil would send its parameters.
ACTIONS: dict[str, tuple[Callable[[Request, Node], Answer], tuple[str, ...]]] = {
    "enrol": (enrol, ("node/",)),
    "fit": (fit, ("teacher/", "plain")),
    "test": (test, ("teacher/", "plain")),
    "score": (score, ("teacher/",)),
    "distil": (distil, ("student/",)),
    "evaluate": (evaluate, ("student/",)),
    "forget": (forget, ("node/",)),
}


def handle(message: Message, context: Context) -> Message:
    """Answer a message. What a user can mend goes back as a refusal with its reason; anything else is a defect and raises."""
    stamp: Stamp | None = None
    started = time.monotonic()
    try:
        request = read_request(message)
        stamp = request.stamp
        if stamp.action not in ACTIONS:
            raise ReplyError(unknown("action", stamp.action, ACTIONS))
        answer, roles = ACTIONS[stamp.action]
        if not stamp.role.startswith(roles):
            raise ReplyError(f"{stamp.action!r} is asked of {stamp.role!r}, it is for {' and '.join(roles)} alone; this node refuses")
        node = Node(request.config, context.node_config)
        values, metrics, arrays = answer(request, node)
        if not stamp.role.startswith("node/"):
            values["holds"] = json.dumps(asdict(node.holds(stamp.role)))
    except CkdError as error:
        # Training is a function of what was asked, so it would fail again; memory is not.
        final = isinstance(error, TrainingError) and not isinstance(error, TooLittleMemoryError)
        return refusal(message, stamp, str(error), final=final)
    except OSError as error:  # a full or unwritable disk, above all
        return refusal(message, stamp, f"the node's disk: {error}")
    return reply(message, stamp, metrics, arrays, busy=time.monotonic() - started, **values)


def _at_epoch(request: Request, node: Node, model: Fit, share: tuple[int, int]) -> tuple[Fit, bool]:
    """A worker's model before the epoch asked for, and whether its optimiser starts anew.

    The workspace is where it should be, or a round ahead (then the state before that round is taken). Where it has neither (it was lost,
    or another node played this worker meanwhile) the weights are the server's all the same and only Adam's moments start anew.
    """
    run, role, first = request.stamp.run, request.stamp.role, int(request.values["from-epoch"])
    if model.epoch == first:
        return model, False
    if first:
        model, _ = node.saved(run, role, share, previous=True)
        if model.epoch == first:
            return model, False
    model = node.fresh(role, share)
    model.epoch = first
    return model, first > 0


def _fingerprint(request: Request) -> str:
    """Of everything that decides the outcome of a round of distillation."""
    digest = hashlib.sha256(json.dumps(dict(sorted(request.values.items()))).encode())
    for name, array in sorted(request.arrays.items()):
        digest.update(name.encode() + b"\0" + array.tobytes())
    return digest.hexdigest()


def _check_sheets(request: Request, steps: list[StepTriples]) -> dict[str, np.ndarray]:
    """The teachers' sheets, each bound to exactly the triples that this worker derived itself."""
    hashes: dict[str, str] = json.loads(str(request.values["hashes"]))
    own = triples_hash(steps) if hashes else ""
    sheets = {}
    for modality, said in hashes.items():
        if said != own:
            raise ReplyError(
                f"the margins of teacher {modality} belong to other triples ({said[:12]} instead of {own[:12]}); its split, seed or code differs"
            )
        sheet = request.arrays.get(f"margins/{modality}")
        shape = (len(steps), steps[0].ranking.shape[1] + steps[0].distillation.shape[1])
        if sheet is None or sheet.shape != shape:
            raise ReplyError(f"the margins of teacher {modality} are {'missing' if sheet is None else sheet.shape}, {shape} is needed")
        sheets[modality] = sheet
    return sheets
