"""One federated run: enrolment, teacher rounds, distillation rounds, the end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ckd_fed.config import Config
from ckd_fed.errors import ReplyError
from ckd_fed.evaluation.metrics import RankingMetrics, metric_keys
from ckd_fed.tracking.record import Record
from ckd_fed.tracking.result import Outcome, RunResult, ratio
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.wire import Reply, margin_dtype
from server.enrolment import Plan
from server.exchange import Ask, Exchange, Pending
from server.reweighting import Reweighting, average_weights, weighted_mean

METRIC = "recall@20"


@dataclass
class _Learner:
    """The server's view of a teacher or of the plain student."""

    node: int
    epoch: int = 0
    best_epoch: int = 0
    best: float = 0.0
    done: bool = False


@dataclass
class _Sheets:
    """The teachers' margins of one stretch: modality -> a sheet and a hash for each worker."""

    sheets: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hashes: dict[str, list[str]] = field(default_factory=dict)


class Federation:
    """Runs the two phases over an exchange, and records them.

    The server holds no features and trains nothing: it passes margins from teachers to students, averages the workers' parameters,
    merges their effects, decides when to stop and keeps the best student.

    Args:
        exchange: with the nodes.
        plan: who plays which role.
        record: of the run.
    """

    def __init__(self, exchange: Exchange, plan: Plan, record: Record) -> None:
        self.exchange = exchange
        self.plan = plan
        self.record = record
        self.config: Config = exchange.config
        self.number = 0  # of the round, over both phases
        self.result = RunResult(plan.modalities, record.directory)
        self.reweighting = Reweighting(tuple(plan.teachers) if plan.card.counterfactual else ())
        self.steps = plan.card.n_train // self.config.training.batch_size + 1

    def run(self) -> RunResult:
        """Both phases, then the best student's test."""
        self._teach()
        self._distil()
        return self.result

    # --- phase 1 -----------------------------------------------------------------------------------------------------------------

    def _teach(self) -> None:
        """Teacher rounds until every teacher (and the plain student, if asked for) has converged; then their tests."""
        learners = {f"teacher/{m}": _Learner(node) for m, node in self.plan.teachers.items()}
        if self.config.plain and self.plan.teachers:
            learners["plain"] = _Learner(self.plan.students[0])
        epochs = self.config.teacher_round
        while any(not learner.done for learner in learners.values()):
            self.number += 1
            started = time.monotonic()
            asks = [
                Ask(learner.node, "fit", role, values={"from-epoch": learner.epoch, "epochs": epochs})
                for role, learner in learners.items()
                if not learner.done
            ]
            replies = self.exchange.ask(self.number, asks)
            reports = {}
            for ask in asks:
                learner = learners[ask.role]
                reports[ask.role] = self._take_fit(replies["fit", ask.role], learner)
            self.record.pretraining_round(self.number, reports, time.monotonic() - started, sum(reply.n_bytes for reply in replies.values()))
        replies = self.exchange.ask(self.number, [Ask(learner.node, "test", role) for role, learner in learners.items()])
        for role, learner in learners.items():
            metrics, chosen = _split_readout(replies["test", role].numbers(metric_keys(self.config.ks)))
            self.result.outcomes[role] = Outcome(learner.best_epoch, learner.epoch, learner.best, metrics, chosen)

    def _take_fit(self, reply: Reply, learner: _Learner) -> list[dict[str, float]]:
        rows = reply.rows([f"val/{METRIC}", "epoch", "loss/total", "gain"])
        epoch = reply.integer("epoch", learner.epoch)
        asked = self.config.teacher_round
        if not learner.epoch < epoch <= min(learner.epoch + asked, self.config.training.epochs):
            raise ReplyError(f"{reply.stamp}: it says that it is at epoch {epoch} after at most {asked} from {learner.epoch}")
        learner.epoch, learner.done = epoch, reply.flag("done")
        learner.best_epoch = reply.integer("best-epoch", -1)
        learner.best = max([learner.best, *(row[f"val/{METRIC}"] for row in rows)])
        if rows:
            rows[-1]["done"] = float(learner.done)
        return rows

    # --- phase 2 -----------------------------------------------------------------------------------------------------------------

    def _distil(self) -> None:
        """Distillation rounds: the scores of the next stretch are fetched while this one trains."""
        config = self.config
        stopping = EarlyStopping(config.training.patience)
        weights: dict[str, np.ndarray] | None = None
        best: dict[str, np.ndarray] = {}
        epoch = 0
        scores = self._request_scores(epoch)
        sheets = self._take_scores(self.exchange.all_replies(scores), epoch) if scores else _Sheets()
        while epoch < config.training.epochs and not stopping.stop:
            self.number += 1
            started = time.monotonic()
            epochs = self._stretch(epoch)
            training = self.exchange.send(self.number, self._distil_asks(epoch, epochs, weights, sheets))
            ahead = self._request_scores(epoch + epochs)
            replies = self.exchange.all_replies(training, *([ahead] if ahead else []))
            weights, values = self._take_students(replies, epoch + epochs, epochs, weights)
            epoch += epochs
            if len(self.plan.students) > 1:
                values.update(self._evaluate(weights, "val"))
            gain = stopping.update(values[f"val/{METRIC}"], epoch)
            if gain:
                best = weights
                self.record.checkpoint("best", best, epoch=epoch, round=self.number)
            self.record.checkpoint("last", weights, epoch=epoch, round=self.number)
            n_bytes = training.sent_bytes + sum(reply.n_bytes for reply in replies.values())
            margin_bytes = sum(reply.n_bytes for (action, _), reply in replies.items() if action == "score")
            values.update(epoch=float(epoch), gain=float(gain), seconds=time.monotonic() - started, bytes=float(n_bytes))
            values["bytes/margins"] = float(margin_bytes)
            values.update(self.exchange.seconds_by_role(replies))
            self.record.distillation_round(self.number, self._against_teachers(values), self.plan.modalities)
            if ahead:
                sheets = self._take_scores(replies, epoch)
        tested = self._evaluate(best, "test")
        metrics, chosen = _split_readout({name.removeprefix("val/"): value for name, value in tested.items()})
        self.result.outcomes["student"] = Outcome(stopping.best_epoch, epoch, stopping.best, metrics, chosen)

    def _stretch(self, epoch: int) -> int:
        """Epochs of the round that starts at an epoch: up to the next validation, or the last epoch."""
        return max(0, min(self.config.training.validate_every, self.config.training.epochs - epoch))

    def _request_scores(self, epoch: int) -> Pending | None:
        """Ask all teachers for the margins of the stretch that starts at an epoch; None if there is none."""
        epochs = self._stretch(epoch)
        if not epochs or not self.plan.teachers:
            return None
        values = {"from-epoch": epoch, "epochs": epochs, "workers": len(self.plan.students)}
        return self.exchange.send(self.number + 1, [Ask(node, "score", f"teacher/{m}", values=values) for m, node in self.plan.teachers.items()])

    def _take_scores(self, replies: Mapping[tuple[str, str], Reply], epoch: int) -> _Sheets:
        """Check the sheets: shape, dtype, finite, and bound to the same triples by every teacher."""
        config, taken = self.config, _Sheets()
        columns = config.training.batch_size + config.distillation.batch_size
        workers = len(self.plan.students)
        for m in self.plan.teachers:
            reply = replies["score", f"teacher/{m}"]
            shapes = [(self._stretch(epoch) * len(range(worker, self.steps, workers)), columns) for worker in range(workers)]
            taken.sheets[m] = [reply.array(f"margins/{worker}", shape, margin_dtype(config)) for worker, shape in enumerate(shapes)]
            hashes = reply.values.get("hashes")
            if not isinstance(hashes, list) or len(hashes) != workers or not all(isinstance(said, str) for said in hashes):
                raise ReplyError(f"{reply.stamp}: its hashes are {hashes!r}, one for each of {workers} workers is needed")
            taken.hashes[m] = hashes
        first = next(iter(taken.hashes))
        for m, hashes in taken.hashes.items():
            if hashes != taken.hashes[first]:
                raise ReplyError(f"teachers {first} and {m} answered for different triples; their split, seed or code differs")
        return taken

    def _distil_asks(self, epoch: int, epochs: int, weights: Mapping[str, np.ndarray] | None, sheets: _Sheets) -> list[Ask]:
        asks = []
        for worker, node in enumerate(self.plan.students):
            arrays = {f"weights/{name}": array for name, array in (weights or {}).items()}
            arrays.update({f"margins/{m}": by_worker[worker] for m, by_worker in sheets.sheets.items()})
            values = {
                "from-epoch": epoch,
                "epochs": epochs,
                "worker": worker,
                "workers": len(self.plan.students),
                "hashes": json.dumps({m: hashes[worker] for m, hashes in sheets.hashes.items()}),
                "validate": len(self.plan.students) == 1,
            }
            asks.append(Ask(node, "distil", f"student/{worker}", arrays, values))
        return asks

    def _take_students(
        self, replies: Mapping[tuple[str, str], Reply], epoch: int, epochs: int, like: Mapping[str, np.ndarray] | None
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Check the workers' replies and merge them: weights averaged by samples, effects and weights of the modalities merged."""
        kinds = ("specific", "generic", *(("effect", "weight") if self.plan.card.counterfactual else ()))
        required = ["loss/total", *(f"{kind}/{m}" for kind in kinds for m in self.plan.teachers)]
        if len(self.plan.students) == 1:
            required += [f"val/{METRIC}", *(f"only/{m}/{METRIC}" for m in self.plan.modalities if self.plan.card.counterfactual)]
        parameters: list[dict[str, np.ndarray]] = []
        reports: list[dict[str, float]] = []
        samples: list[int] = []
        for worker in range(len(self.plan.students)):
            reply = replies["distil", f"student/{worker}"]
            if reply.integer("epoch") != epoch:
                raise ReplyError(f"{reply.stamp}: it stopped at epoch {reply.integer('epoch')}, {epoch} was asked for")
            expected = epochs * len(range(worker, self.steps, len(self.plan.students))) * self.config.training.batch_size
            if reply.integer("samples", 1) != expected:
                raise ReplyError(f"{reply.stamp}: it says that it trained on {reply.integer('samples')} samples, its share is {expected}")
            parameters.append(reply.weights(like or (parameters[0] if parameters else None)))
            reports.append(reply.numbers(required))
            samples.append(expected)
        merged = {name: weighted_mean([report[name] for report in reports], samples) for name in reports[0]}
        merged.update(self.reweighting.merge(self.number, reports, samples))
        return average_weights(parameters, samples), merged

    def _evaluate(self, weights: Mapping[str, np.ndarray], split: str) -> dict[str, float]:
        """Rank with some weights, each worker a share of the users.

        Returns:
            ``val/<metric>``, ``only/m/<metric>``, and with calibration on test ``calibrated/<metric>`` and ``readout/...``.
        """
        workers = len(self.plan.students)
        arrays = {f"weights/{name}": array for name, array in weights.items()}
        asks = [
            Ask(node, "evaluate", f"student/{worker}", arrays, {"split": split, "worker": worker, "workers": workers})
            for worker, node in enumerate(self.plan.students)
        ]
        replies = self.exchange.ask(self.number, asks)
        metrics, chosen = RankingMetrics(self.config.ks), {}
        for ask in asks:
            reply = replies["evaluate", ask.role]
            numbers = reply.numbers([f"sum/{METRIC}"])
            metrics.merge({name.removeprefix("sum/"): value for name, value in numbers.items() if name.startswith("sum/")}, reply.integer("n-users"))
            chosen.update({name: value for name, value in numbers.items() if name.startswith("readout/")})
        means = metrics.compute()
        for name, value in means.items():
            if not 0 <= value <= 1 + 1e-9:
                raise ReplyError(f"{split} {name} comes to {value!r}, a share between 0 and 1 is needed")
        return {name if "/" in name else f"val/{name}": value for name, value in means.items()} | chosen

    def _against_teachers(self, values: dict[str, float]) -> dict[str, float]:
        for m in self.plan.teachers:
            teacher = self.result.outcomes[f"teacher/{m}"].validation
            values[f"teacher/{m}/{METRIC}"] = teacher
            if self.plan.card.counterfactual:
                values[f"reached/{m}"] = ratio(values[f"only/{m}/{METRIC}"], teacher)
        return values


def _split_readout(numbers: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics, and what was chosen on validation to read the model out."""
    chosen = {name: value for name, value in numbers.items() if name.startswith("readout/")}
    return {name: value for name, value in numbers.items() if name not in chosen}, chosen
