"""Taking in what students have trained: a lone one's validations, or the mean of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from ckd_fed.errors import ReplyError
from ckd_fed.evaluation.metrics import METRIC
from server.checks import WorkerReport
from server.evaluation import Evaluation
from server.recovery import Round
from server.reweighting import Reweighting, average_weights, merged_mean
from server.rounds import Rounds
from server.stretch import advice, grown

_JUDGED = 3  # the round of several students by whose time their length is judged: the first waits for its margins as well


class Students(ABC):
    """Takes the students' answers into the state and the record.

    Args:
        rounds: of the run.
        reweighting: effects and weights so far.
    """

    def __init__(self, rounds: Rounds, reweighting: Reweighting) -> None:
        self._rounds = rounds
        self._reweighting = reweighting
        self._state, self._record = rounds.state, rounds.record

    @abstractmethod
    def take(self, done: Round, epochs: int, due: bool, seconds: float, rounds: Sequence[Round]) -> None:
        """Take in an exchange.

        Args:
            done: the requests to the students and what came of them.
            epochs: that it held.
            due: whether it holds a validation, or one is due after it.
            seconds, rounds: that it took, and what it was made of.
        """

    def _write_row(self, number: int, row: dict[str, float]) -> None:
        """Record a round, with the teachers' numbers beside."""
        self._record.distillation_round(number, self._rounds.result.against_teachers(row, self._rounds.teachers), self._rounds.plan.modalities)

    def _keep_best(self, parameters: dict[str, np.ndarray], number: int) -> None:
        self._state.best = parameters
        self._record.checkpoint("best", parameters, epoch=self._state.stopping.best_epoch, round=number)

    def _keep_last(self) -> None:
        self._record.checkpoint("last", self._state.last, epoch=self._state.epoch, round=self._state.number)

    def _say_unvalidated(self, seconds: float) -> None:
        self._state.number += 1
        self._record.write(f"round {self._state.number}: epoch {self._state.epoch}, {seconds:.1f} s; the next validation is yet to come")

    def _say_fresh(self, worker: int, report: WorkerReport) -> None:
        if report.fresh:
            self._record.write(f"NOTE: student/{worker} had no workspace for this round; its optimiser started anew from the server's parameters")


class LoneStudent(Students):
    """One student, which validates and stops early by itself: a round for each of its validations."""

    def take(self, done: Round, epochs: int, due: bool, seconds: float, rounds: Sequence[Round]) -> None:
        """A row for each validation, time and bytes dealt out among them by the seconds that each took to train, and the parameters of the last
        gain, should there be one."""
        state, gained = self._state, False
        report: WorkerReport = done.value("distil", "student/0")
        self._say_fresh(0, report)
        state.last, state.epoch = report.weights, report.epoch
        traffic = self._rounds.add(seconds, *rounds)
        took = [row.pop("seconds", 1.0) for row in report.rows]
        for row, part in zip(report.rows, took, strict=True):
            state.number += 1
            part = part / sum(took) if sum(took) else 1 / len(took)
            row.update(self._reweighting.merge(state.number, [row], [1]))
            gain = state.stopping.update(row[f"val/{METRIC}"], int(row["epoch"]))
            gained = gained or gain
            row.update(gain=float(gain), seconds=seconds * part, **{name: value * part for name, value in traffic.items()})
            self._write_row(state.number, row)
        if not report.rows:
            self._say_unvalidated(seconds)
        if gained:
            self._keep_best(state.last if report.best is None else report.best, state.number)
        self._keep_last()
        # A node that gives an answer once more works no time at all, but the rows say what their epochs took.
        messaging = traffic["seconds/messaging"]
        state.stretch = grown(self._rounds.config, state.stretch, len(report.rows), messaging, max(seconds, messaging + sum(took)))


class SeveralStudents(Students):
    """Students that share the steps of every epoch and are averaged after each round.

    Their mean is validated within the next round, which carries it anyhow: a request of its own would cost as much messaging again.

    Args:
        rounds, reweighting: see :class:`Students`.
        evaluation: of the student.
    """

    def __init__(self, rounds: Rounds, reweighting: Reweighting, evaluation: Evaluation) -> None:
        super().__init__(rounds, reweighting)
        self._evaluation = evaluation
        self._taken = 0  # rounds in this process

    def take(self, done: Round, epochs: int, due: bool, seconds: float, rounds: Sequence[Round]) -> None:
        """First the validation of what they started from, which ends the round before; then, unless it ends training, what they trained."""
        state = self._state
        reports: list[WorkerReport] = [done.value("distil", f"student/{worker}") for worker in range(state.workers)]
        traffic = self._rounds.add(seconds, *rounds)
        if state.awaited:
            self._record_awaited(self._evaluation.validation(report.evaluation for report in reports if report.evaluation), {})
        if state.stopping.stop:
            return
        row = {**self._merged(reports), "seconds": seconds, **traffic}
        state.epoch += epochs
        if due:
            state.number += 1
            state.awaited = {**row, "epoch": float(state.epoch), "round": float(state.number)}
        else:
            self._say_unvalidated(seconds)
        self._keep_last()
        self._taken += 1
        if self._taken == _JUDGED and state.epoch < self._rounds.config.training.epochs:  # the last one may be shorter
            said = advice(self._rounds.config, state.workers, epochs, traffic["seconds/messaging"], seconds)
            if said:
                self._record.write(said)

    def take_validation(self, metrics: Mapping[str, float], seconds: float, done: Round) -> None:
        """Take in the validation of the last round, which no other follows."""
        self._record_awaited(metrics, {"seconds": seconds, **self._rounds.add(seconds, done)})

    def _record_awaited(self, metrics: Mapping[str, float], traffic: Mapping[str, float]) -> None:
        """The validation that a round was still to have, of the parameters that it ended with; ``traffic`` is what it took by itself."""
        state, row = self._state, dict(self._state.awaited or {})
        number = int(row.pop("round"))
        for name, value in traffic.items():
            row[name] = row.get(name, 0.0) + value
        row.update(metrics)
        gain = state.stopping.update(row[f"val/{METRIC}"], int(row["epoch"]))
        row["gain"] = float(gain)
        self._write_row(number, row)
        if gain:
            self._keep_best(state.last, number)
        state.awaited = None

    def _merged(self, reports: Sequence[WorkerReport]) -> dict[str, float]:
        """Parameters averaged by samples, means of metrics, effects and weights over all samples.

        Raises:
            ReplyError: the students are not of one shape.
        """
        for worker, report in enumerate(reports):
            self._say_fresh(worker, report)
            if {name: array.shape for name, array in report.weights.items()} != {name: array.shape for name, array in reports[0].weights.items()}:
                raise ReplyError(f"student/{worker} and student/0 sent parameters of different shapes; their features differ")
        samples = [report.samples for report in reports]
        means = [report.rows[0] for report in reports]
        names = [name for name in means[0] if all(name in row for row in means) and not name.startswith("asked/")]
        merged = {name: merged_mean(name, means, samples) for name in names}
        merged.update(self._reweighting.merge(self._state.number + 1, means, samples))
        self._state.last = average_weights([report.weights for report in reports], samples)
        return merged
