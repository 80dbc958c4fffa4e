"""What a node does when it is asked: one function per action of the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Context, Message

from ckd_fed.checkpoint import to_arrays, to_tensors
from ckd_fed.data.triples import StepTriples, TripleStream, triples_hash
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.errors import CkdError, ReplyError, unknown
from ckd_fed.evaluation.metrics import RankingMetrics
from ckd_fed.training.build import triple_stream
from ckd_fed.training.fit import mean_values, validate
from ckd_fed.training.trainer import Trainer, Values
from ckd_fed.wire import Request, Stamp, margin_dtype, read_request, refusal, reply
from clients.node import Node

Answer = tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]  # values, metrics, arrays


def enrol(request: Request, node: Node) -> Answer:
    """Say who this node is and what it holds."""
    return {"card": json.dumps(asdict(node.card()))}, {}, {}


def fit(request: Request, node: Node) -> Answer:
    """Train a teacher (or the plain student) for the epochs of a round, from where its workspace stands."""
    run, role, number = request.stamp.run, request.stamp.role, request.stamp.round
    model, state = node.fit(run, role)
    if state.get("round") == number:  # asked again because the answer was lost: the same answer
        rows = state["rows"]
    else:
        _expect_epoch(request, model.epoch)
        rows = model.advance(int(request.values["epochs"]))
        node.save(run, role, model, round=number, rows=rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    values = {"done": model.done, "epoch": model.epoch, "best-epoch": model.stopping.best_epoch}
    return values, columns, {}


def test(request: Request, node: Node) -> Answer:
    """Test the best of a teacher (or of the plain student, read out as the configuration says)."""
    model, _ = node.fit(request.stamp.run, request.stamp.role)
    if not model.best:
        raise ReplyError(f"{request.stamp.role} has no trained parameters in this node's workspace; it was lost, or belongs to another node")
    model.trainer.restore(model.best)
    metrics, chosen = _diagnose(request, model.trainer, "test", (0, 1))
    return {}, {**metrics.compute(), **chosen}, {}


def score(request: Request, node: Node) -> Answer:
    """A teacher's margins for a stretch of the stream: a sheet for each student worker, bound to its triples by hash."""
    model, _ = node.fit(request.stamp.run, request.stamp.role)
    if not model.best:
        raise ReplyError(f"{request.stamp.role} has no trained parameters in this node's workspace; it was lost, or belongs to another node")
    model.trainer.restore(model.best)
    stream = triple_stream(request.config, model.trainer.dataset, distillation=True)
    teacher, dtype, workers = model.trainer.soft_scores(), margin_dtype(request.config), int(request.values["workers"])
    sheets, hashes = {}, []
    for worker in range(workers):
        steps = _stretch(request, stream, (worker, workers))
        sheets[f"margins/{worker}"] = margin_sheet(teacher, steps, dtype)
        hashes.append(triples_hash(steps))
    return {"hashes": hashes}, {}, sheets


def distil(request: Request, node: Node) -> Answer:
    """Train a student worker's share of a stretch of epochs on the teachers' margins, from the weights that the server sends."""
    run, role, number = request.stamp.run, request.stamp.role, request.stamp.round
    worker, workers = int(request.values["worker"]), int(request.values["workers"])
    model, _ = node.fit(run, role, (worker, workers))
    _expect_epoch(request, model.epoch)
    weights = to_tensors(request.arrays, "weights/")
    if weights:
        model.trainer.restore(weights)
    elif model.epoch:
        raise ReplyError(f"{role}: epoch {model.epoch} is asked for without weights to go on from")

    epochs = [model.trainer.stream.epoch(model.epoch + offset, (worker, workers)) for offset in range(int(request.values["epochs"]))]
    sheets = _check_sheets(request, [step for steps in epochs for step in steps])
    rows, done = [], 0
    for steps in epochs:
        part = {m: sheet[done : done + len(steps)] for m, sheet in sheets.items()} if sheets else None
        rows.append(model.trainer.train_epoch(model.epoch, part, steps))
        model.epoch += 1
        done += len(steps)
    node.save(run, role, model, round=number)
    metrics = mean_values(rows)
    if request.values["validate"]:
        metrics.update(validate(model.trainer))
    samples = done * request.config.training.batch_size
    return {"samples": samples, "epoch": model.epoch}, metrics, to_arrays(model.trainer.snapshot(), "weights/")


def evaluate(request: Request, node: Node) -> Answer:
    """Rank a share of the users with the weights that the server sends; the answer holds sums, to be merged with other workers'."""
    worker, workers = int(request.values["worker"]), int(request.values["workers"])
    model, _ = node.fit(request.stamp.run, request.stamp.role, (worker, workers))
    model.trainer.restore(to_tensors(request.arrays, "weights/"))
    metrics, chosen = _diagnose(request, model.trainer, str(request.values["split"]), (worker, workers))
    return {"n-users": metrics.n_users}, {**{f"sum/{name}": total for name, total in metrics.sums.items()}, **chosen}, {}


def _diagnose(request: Request, trainer: Trainer, split: str, share: tuple[int, int]) -> tuple[RankingMetrics, Values]:
    """Metrics of every view; on test, a student's calibrated ones too if they are asked for (every worker fits the same weights)."""
    held_out = {"val": trainer.dataset.val, "test": trainer.dataset.test}[split]
    if split == "test" and request.config.evaluation.calibrate and not request.stamp.role.startswith("teacher/"):
        return trainer.read_out(held_out, share)
    return trainer.diagnose(held_out, share), {}


ACTIONS: dict[str, Callable[[Request, Node], Answer]] = {
    "enrol": enrol,
    "fit": fit,
    "test": test,
    "score": score,
    "distil": distil,
    "evaluate": evaluate,
}


def handle(message: Message, context: Context) -> Message:
    """Answer a message. What a user can mend goes back as a refusal with its reason; anything else is a defect and raises."""
    stamp: Stamp | None = None
    try:
        request = read_request(message)
        stamp = request.stamp
        if stamp.action not in ACTIONS:
            raise ReplyError(unknown("action", stamp.action, ACTIONS))
        values, metrics, arrays = ACTIONS[stamp.action](request, Node(request.config, context.node_config))
    except CkdError as error:
        return refusal(message, stamp, str(error))
    except OSError as error:  # a full or unwritable disk, above all
        return refusal(message, stamp, f"the node's disk: {error}")
    return reply(message, stamp, metrics, arrays, **values)


def _stretch(request: Request, stream: TripleStream, share: tuple[int, int]) -> list[StepTriples]:
    first, epochs = int(request.values["from-epoch"]), int(request.values["epochs"])
    return [step for epoch in range(first, first + epochs) for step in stream.epoch(epoch, share)]


def _expect_epoch(request: Request, epoch: int) -> None:
    wanted = int(request.values["from-epoch"])
    if epoch != wanted:
        raise ReplyError(
            f"{request.stamp.role} is at epoch {epoch} in this node's workspace, the server expects {wanted}; "
            "the workspace was lost, or another node plays this role"
        )


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
