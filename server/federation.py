"""One federated run: teacher rounds, distillation rounds, the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ckd_fed.analysis.users import user_table
from ckd_fed.config import Config
from ckd_fed.errors import DataError, ReplyError
from ckd_fed.evaluation.metrics import RankingMetrics, metric_keys
from ckd_fed.evaluation.tested import merge_shares
from ckd_fed.tracking.record import Record
from ckd_fed.tracking.result import Outcome, RunResult, ratio
from ckd_fed.training.fit import validations_due
from ckd_fed.training.trainer import METRIC
from ckd_fed.wire import Reply
from server.checkpoints import DISTILLATION, FINISHED, TEACHERS, Learner, RunState, save_state
from server.checks import (
    FitReport,
    Sheets,
    Sums,
    WorkerReport,
    check_evaluation,
    check_fit,
    check_sheets,
    check_test,
    check_worker,
    disagreement,
    split_readout,
)
from server.enrolment import Plan
from server.exchange import Ask, Exchange
from server.recovery import Recovery, Round
from server.reweighting import Reweighting, average_weights, merged_mean
from server.roster import Roster
from server.stretch import advice, grown, sheet_bytes, stretch_epochs

_JUDGED = 3  # the round of several students by whose time their length is judged: the first waits for its margins as well


class Federation:
    """Runs the two phases over an exchange, records them, and checkpoints every round.

    The server holds no features and trains nothing: it passes margins from teachers to students, averages the workers' parameters,
    merges their effects, decides when to stop and keeps the best student.

    Args:
        exchange: with the nodes.
        plan: who plays which role.
        record: of the run.
        state: a new run's, or that of a run to go on with.
    """

    def __init__(self, exchange: Exchange, plan: Plan, record: Record, state: RunState) -> None:
        self.plan = plan
        self.record = record
        self.state = state
        self.config: Config = exchange.config
        self.teachers = [m for m in plan.modalities if m in {*plan.teachers, *plan.lost} and m not in state.dropped]
        self.roster = Roster(exchange, plan, record.write)
        self.recovery = Recovery(exchange, self.roster, record.write)
        self.result = RunResult(plan.modalities, record.directory, state.outcomes)
        self.reweighting = Reweighting(tuple(self._weighed(self.teachers)), state.reweighting)
        self.steps = plan.card.n_train // self.config.training.batch_size + 1
        self.sheet_bytes = sheet_bytes(self.config, plan.card.n_train)
        self._elapsed, self._started = state.elapsed, time.monotonic()
        self._taken = 0  # rounds of several students, in this process

    def run(self) -> RunResult:
        """Both phases from where the state stands, then the best student's test."""
        if not self.state.number:
            self.checkpoint()  # from now on there is something to resume
        self._write_students()  # those there may be of a round that was not written down, and is done again now
        for m, reason in self.plan.lost.items():
            self._drop(m, reason)
        if self.state.phase == TEACHERS:
            self._teach()
        self._distil()
        return self.result

    @property
    def elapsed(self) -> float:
        """Seconds that this run has taken, in all its processes."""
        return self._elapsed + time.monotonic() - self._started

    def finish(self) -> None:
        """Mark the run as finished, once its final row is written."""
        self.state.phase = FINISHED
        self.checkpoint()

    def _write_students(self) -> None:
        """Write the students of the state, for whoever uses them, as far as there are any."""
        state = self.state
        for name, parameters, epoch in (("best", state.best, state.stopping.best_epoch), ("last", state.last, state.epoch)):
            if parameters:
                self.record.checkpoint(name, parameters, epoch=epoch, round=state.number)

    def checkpoint(self) -> None:
        """Write down the state as of the last row of the record."""
        self.state.elapsed = self.elapsed
        self.state.recorded = self.record.position()
        save_state(self.record.directory, self.state)

    # --- phase 1 -----------------------------------------------------------------------------------------------------------------

    def _teach(self) -> None:
        """Teacher rounds until every teacher (and the plain student, if asked for) has converged; then their tests."""
        state, epochs = self.state, self.config.teacher_round
        if not state.learners:
            roles = [f"teacher/{m}" for m in self.teachers] + (["plain"] if self.config.plain and self.teachers else [])
            state.learners.update({role: Learner() for role in roles})
        while any(not learner.done for learner in state.learners.values()):
            started = time.monotonic()
            asks = [
                Ask(
                    state.number + 1,
                    "fit",
                    role,
                    values={"from-epoch": learner.epoch, "epochs": epochs},
                    check=partial(check_fit, config=self.config, before=learner.epoch, stopping=learner.stopping(self.config.training)),
                )
                for role, learner in state.learners.items()
                if not learner.done
            ]
            done = self._ask(asks)
            state.number += 1
            reports = {ask.role: self._take_fit(done.value("fit", ask.role), state.learners[ask.role]) for ask in asks if ask.role in state.learners}
            seconds = time.monotonic() - started
            self._add(seconds, done)
            self.record.pretraining_round(state.number, reports, seconds, done.sent_bytes + _n_bytes(done))
            self.checkpoint()
        asks = [
            Ask(state.number, "test", role, values=self._best(role), check=partial(check_test, config=self.config, card=self.plan.card))
            for role in state.learners
        ]
        done = self._ask(asks) if asks else Round()
        for role, learner in state.learners.items():
            report = done.value("test", role)
            learner.width = report.width
            state.outcomes[role] = Outcome(learner.best_epoch, learner.epoch, learner.best, report.metrics, report.readout)
            state.tested[role] = report.by_user
        state.phase = DISTILLATION
        self.checkpoint()

    def _take_fit(self, report: FitReport, learner: Learner) -> list[dict[str, float]]:
        learner.epoch, learner.best_epoch, learner.done = report.epoch, report.best_epoch, report.done
        learner.best = max([learner.best, *(row[f"val/{METRIC}"] for row in report.rows)])
        report.rows[-1]["done"] = float(learner.done)
        return report.rows

    def _best(self, role: str) -> dict[str, float]:
        """Which parameters of a teacher are meant: a node that does not hold them trains up to them."""
        learner = self.state.learners[role]
        return {"best-epoch": learner.best_epoch, "best": learner.best}

    # --- phase 2 -----------------------------------------------------------------------------------------------------------------

    def _distil(self) -> None:
        """Distillation rounds: the scores of the next stretch are fetched while this one trains."""
        config, state = self.config, self.state
        sheets: dict[str, Sheets] = {}
        epochs = self._stretch(state.epoch)
        while epochs and not state.stopping.stop:
            started = time.monotonic()
            first = Round()
            if self.teachers and not sheets:
                first = self._ask(self._score_asks(state.epoch, epochs, state.number + 1))
                sheets = self._agreed(first, state.epoch, epochs, state.number + 1)
            taught = list(sheets)
            following = self._stretch(state.epoch + epochs)
            planned = len(validations_due(config.training.validate_every, config.training.epochs, state.epoch, state.epoch + epochs))
            ahead = self._score_asks(state.epoch + epochs, following, state.number + 1 + max(1, planned))
            done = self._ask([*self._distil_asks(epochs, sheets), *ahead])
            self.reweighting.modalities = tuple(self._weighed(taught))
            seconds, rounds = time.monotonic() - started, [first, done]
            if state.workers == 1:
                self._take_stretch(done, seconds, rounds)
            else:
                self._take_workers(done, epochs, bool(planned), seconds, rounds)
            self.checkpoint()
            sheets = self._agreed(done, state.epoch, following, state.number + 1) if ahead and self.teachers and not state.stopping.stop else {}
            epochs = following
        if state.awaited:  # the last epoch is over, so there is no round to validate with
            started = time.monotonic()
            done, metrics = self._evaluate(state.last, "val")
            seconds = time.monotonic() - started
            self._record_awaited(metrics, {"seconds": seconds, **self._add(seconds, done)})
            self.checkpoint()
        done, tested = self._evaluate(state.best, "test")
        test, readout = split_readout({name.removeprefix("val/"): value for name, value in tested.items()})
        state.outcomes["student"] = Outcome(state.stopping.best_epoch, state.epoch, state.stopping.best, test, readout)
        shares = [done.value("evaluate", f"student/{worker}").by_user for worker in range(state.workers)]
        state.tested["student"] = merge_shares(shares)
        if config.evaluation.user_table:
            self._write_users()
        self.record.groups([row for by_user in state.tested.values() for row in by_user.groups])

    def _write_users(self) -> None:
        """Write the table of the test's users. A node may have sent the ids of others than it tested: then the run ends without the table."""
        try:
            self.record.users(user_table(self.plan.card.split, self.state.tested))
        except DataError as error:
            self.record.write(f"NOTE: there is no test_users.npz: {error}; `ckd-fed compare` will lack this run")

    def _take_stretch(self, done: Round, seconds: float, rounds: Sequence[Round]) -> None:
        """Take in what a lone student trained: a row for each of its validations, and the parameters of the last gain, should there be one."""
        state = self.state
        report: WorkerReport = done.value("distil", "student/0")
        self._say_fresh(0, report)
        state.last, state.epoch = report.weights, report.epoch
        self._record_stretch(report.rows, state.last if report.best is None else report.best, seconds, rounds)

    def _record_stretch(self, rows: Sequence[dict[str, float]], best: dict[str, np.ndarray], seconds: float, rounds: Sequence[Round]) -> None:
        """A round for each validation, time and bytes dealt out among them by the seconds that each took to train."""
        state, gained = self.state, False
        traffic = self._add(seconds, *rounds)
        took = [row.pop("seconds", 1.0) for row in rows]
        for row, part in zip(rows, took, strict=True):
            state.number += 1
            part = part / sum(took) if sum(took) else 1 / len(took)
            row.update(self.reweighting.merge(state.number, [row], [1]))
            gain = state.stopping.update(row[f"val/{METRIC}"], int(row["epoch"]))
            gained = gained or gain
            row.update(gain=float(gain), seconds=seconds * part, **{name: value * part for name, value in traffic.items()})
            self.record.distillation_round(state.number, self._against_teachers(row), self.plan.modalities)
        if not rows:
            self._say_unvalidated(seconds)
        if gained:
            state.best = best
            self.record.checkpoint("best", state.best, epoch=state.stopping.best_epoch, round=state.number)
        self.record.checkpoint("last", state.last, epoch=state.epoch, round=state.number)
        # A node that gives an answer once more works no time at all, but the rows say what their epochs took.
        messaging = traffic["seconds/messaging"]
        state.stretch = grown(self.config, state.stretch, len(rows), messaging, max(seconds, messaging + sum(took)))

    def _say_unvalidated(self, seconds: float) -> None:
        self.state.number += 1
        self.record.write(f"round {self.state.number}: epoch {self.state.epoch}, {seconds:.1f} s; the next validation is yet to come")

    def _stretch(self, epoch: int) -> int:
        """Epochs of the round that starts at an epoch. Several workers are averaged after each, so there it would change the result."""
        return stretch_epochs(self.config, epoch, self.state.stretch, self.sheet_bytes if self.teachers else 0)

    def _share(self, worker: int) -> int:
        """Steps of an epoch that are a worker's."""
        return len(range(worker, self.steps, self.state.workers))

    def _score_asks(self, epoch: int, epochs: int, number: int) -> list[Ask]:
        """Ask all teachers for the margins of a stretch; none if there is none."""
        if not epochs:
            return []
        values = {"from-epoch": epoch, "epochs": epochs, "workers": self.state.workers}
        steps = [epochs * self._share(worker) for worker in range(self.state.workers)]
        check = partial(check_sheets, config=self.config, steps=steps)
        roles = [f"teacher/{m}" for m in self.teachers]
        return [Ask(number, "score", role, values={**values, **self._best(role)}, check=check) for role in roles]

    def _agreed(self, done: Round, epoch: int, epochs: int, number: int) -> dict[str, Sheets]:
        """The sheets of all teachers, asked for again where they are bound to different triples.

        Raises:
            ReplyError: they still are after ``federation.retry-limit`` tries.
        """
        tries = self.config.federation.retry_limit
        while True:
            sheets: dict[str, Sheets] = {m: done.value("score", f"teacher/{m}") for m in self.teachers}
            reason = disagreement(sheets)
            if not reason:
                return sheets
            if not tries:
                raise ReplyError(reason)
            tries -= 1
            self.record.write(f"{reason}; asking them again")
            done = self._ask(self._score_asks(epoch, epochs, number))

    def _distil_asks(self, epochs: int, sheets: Mapping[str, Sheets]) -> list[Ask]:
        state, weighed = self.state, self._weighed(sheets)
        required = ["loss/total", *(f"{kind}/{m}" for kind in ("specific", "generic") for m in sheets)]
        required += [f"{kind}/{m}" for kind in ("effect", "weight") for m in weighed]
        if state.workers == 1:
            required += [f"val/{METRIC}", *(f"only/{m}/{METRIC}" for m in self._weighed(self.plan.modalities))]
        asks = []
        for worker in range(state.workers):
            arrays = {f"weights/{name}": array for name, array in state.last.items()}
            arrays.update({f"margins/{m}": taken.sheets[worker] for m, taken in sheets.items()})
            values = {
                "from-epoch": state.epoch,
                "epochs": epochs,
                "worker": worker,
                "workers": state.workers,
                "hashes": json.dumps({m: taken.hashes[worker] for m, taken in sheets.items()}),
                "validate": state.workers == 1,
                "evaluate": state.awaited is not None,
                "best": state.stopping.best,
                "best-epoch": state.stopping.best_epoch,
                "waited": state.stopping.waited,
            }
            check = partial(
                check_worker,
                config=self.config,
                before=state.epoch,
                epochs=epochs,
                steps=self._share(worker),
                required=required,
                taught=weighed,
                like=state.last or None,
                stopping=replace(state.stopping) if state.workers == 1 else None,
                whole=self.plan.whole and not self.config.data.hidden_shares,
                evaluation=self._evaluation(worker) if state.awaited else None,
            )
            asks.append(Ask(state.number + 1, "distil", f"student/{worker}", arrays, values, check))
        return asks

    def _take_workers(self, done: Round, epochs: int, due: bool, seconds: float, rounds: Sequence[Round]) -> None:
        """Take in a round of several workers: first the validation of what they started from, which ends the round before; then, unless it ends
        training, what they trained.

        Their mean is validated by the next round, which carries it anyhow: a request of its own would cost as much messaging again.

        Args:
            done: the round.
            epochs: that it held.
            due: whether a validation is due after it.
            seconds, rounds: that it took, and what it was made of.
        """
        state = self.state
        reports: list[WorkerReport] = [done.value("distil", f"student/{worker}") for worker in range(state.workers)]
        traffic = self._add(seconds, *rounds)
        if state.awaited:
            self._record_awaited(self._means(report.evaluation for report in reports if report.evaluation), {})
        if state.stopping.stop:
            return
        row = {**self._merged(reports), "seconds": seconds, **traffic}
        state.epoch += epochs
        if due:
            state.number += 1
            state.awaited = {**row, "epoch": float(state.epoch), "round": float(state.number)}
        else:
            self._say_unvalidated(seconds)
        self.record.checkpoint("last", state.last, epoch=state.epoch, round=state.number)
        self._taken += 1
        if self._taken == _JUDGED and state.epoch < self.config.training.epochs:  # the last one may be shorter
            said = advice(self.config, state.workers, epochs, traffic["seconds/messaging"], seconds)
            if said:
                self.record.write(said)

    def _record_awaited(self, metrics: Mapping[str, float], traffic: Mapping[str, float]) -> None:
        """The validation that a round of several workers was still to have, of the parameters that it ended with; ``traffic`` is what it took by
        itself."""
        state, row = self.state, dict(self.state.awaited or {})
        number = int(row.pop("round"))
        for name, value in traffic.items():
            row[name] = row.get(name, 0.0) + value
        row.update(metrics)
        gain = state.stopping.update(row[f"val/{METRIC}"], int(row["epoch"]))
        row["gain"] = float(gain)
        self.record.distillation_round(number, self._against_teachers(row), self.plan.modalities)
        if gain:
            state.best = state.last
            self.record.checkpoint("best", state.best, epoch=state.stopping.best_epoch, round=number)
        state.awaited = None

    def _merged(self, reports: Sequence[WorkerReport]) -> dict[str, float]:
        """Merge the workers' rounds: parameters averaged by samples, effects and weights of the modalities merged."""
        for worker, report in enumerate(reports):
            self._say_fresh(worker, report)
            if {name: array.shape for name, array in report.weights.items()} != {name: array.shape for name, array in reports[0].weights.items()}:
                raise ReplyError(f"student/{worker} and student/0 sent parameters of different shapes; their features differ")
        samples = [report.samples for report in reports]
        means = [report.rows[0] for report in reports]
        names = [name for name in means[0] if all(name in row for row in means) and not name.startswith("asked/")]
        merged = {name: merged_mean(name, means, samples) for name in names}
        merged.update(self.reweighting.merge(self.state.number + 1, means, samples))
        self.state.last = average_weights([report.weights for report in reports], samples)
        return merged

    def _say_fresh(self, worker: int, report: WorkerReport) -> None:
        if report.fresh:
            self.record.write(f"NOTE: student/{worker} had no workspace for this round; its optimiser started anew from the server's parameters")

    def _evaluate(self, weights: Mapping[str, np.ndarray], split: str) -> tuple[Round, dict[str, float]]:
        """Rank with some weights, each worker a share of the users.

        Returns:
            The round; and ``val/<metric>``, ``only/m/<metric>``, with calibration on test also ``calibrated/<metric>`` and ``readout/...``.
        """
        workers = self.state.workers
        arrays = {f"weights/{name}": array for name, array in weights.items()}
        asks = []
        for worker in range(workers):
            values = {"split": split, "worker": worker, "workers": workers}
            asks.append(Ask(self.state.number, "evaluate", f"student/{worker}", arrays, values, self._evaluation(worker, test=split == "test")))
        done = self._ask(asks)
        shares: list[Sums] = [done.value("evaluate", ask.role) for ask in asks]
        return done, self._means(shares) | {name: value for share in shares for name, value in share.readout.items()}

    def _means(self, shares: Iterable[Sums]) -> dict[str, float]:
        """Means over the users of all workers' shares, those of the joint view as ``val/<metric>``."""
        metrics = RankingMetrics(self.config.ks)
        for share in shares:
            metrics.merge(share.sums, share.n_users)
        return {name if "/" in name else f"val/{name}": value for name, value in metrics.compute().items()}

    def _evaluation(self, worker: int, *, test: bool = False) -> Callable[[Reply], Sums]:
        """The check of a worker's share of an evaluation."""
        required = [*metric_keys(self.config.ks), *(f"only/{m}/{METRIC}" for m in self._weighed(self.plan.modalities))]
        share = worker, self.state.workers
        return partial(check_evaluation, config=self.config, required=required, card=self.plan.card, share=share, test=test)

    def _against_teachers(self, values: dict[str, float]) -> dict[str, float]:
        for m in self.teachers:
            teacher = self.result.outcomes[f"teacher/{m}"].validation
            values[f"teacher/{m}/{METRIC}"] = teacher
            if self.plan.card.counterfactual:
                values[f"reached/{m}"] = ratio(values[f"only/{m}/{METRIC}"], teacher)
        return values

    def _weighed(self, modalities: Iterable[str]) -> list[str]:
        """Those modalities with effects, weights and views of their own: none where scores do not depend on features."""
        return list(modalities) if self.plan.card.counterfactual else []

    # --- both --------------------------------------------------------------------------------------------------------------------

    def _ask(self, asks: Sequence[Ask]) -> Round:
        """Ask, and go on without the teachers that were given up."""
        done = self.recovery.ask(asks)
        for m, reason in done.lost.items():
            self._drop(m, reason)
        return done

    def _drop(self, modality: str, reason: str) -> None:
        """Go on without a teacher: the weights of the others are normalised to their number by the objective."""
        self.teachers.remove(modality)
        self.state.learners.pop(f"teacher/{modality}", None)
        self.state.dropped[modality] = reason
        number = self.state.number + 1
        self.record.row("dropped", modality=modality, reason=reason, round=number)
        if not self.teachers:
            raise ReplyError(f"the last teacher is lost ({reason}); nothing is left to distil")
        self.record.write(f"!! teacher {modality} is DROPPED in round {number}: {reason}")
        self.record.write(f"!! going on with {', '.join(self.teachers)} (federation.on-lost-teacher=drop); weights are those of {len(self.teachers)}")

    def _add(self, seconds: float, *rounds: Round) -> dict[str, float]:
        """Add a round to the totals; its numbers for the record."""
        totals = self.state.totals
        messaging = max(0.0, seconds - sum(done.busy for done in rounds))
        n_bytes = sum(done.sent_bytes + _n_bytes(done) for done in rounds)
        margins: dict[str, int] = {}
        for done in rounds:
            for (action, role), answer in done.answers.items():
                if action == "score":
                    m = role.removeprefix("teacher/")
                    margins[m] = margins.get(m, 0) + answer.n_bytes
        totals.seconds += seconds
        totals.messaging += messaging
        totals.n_bytes += n_bytes
        totals.margin_bytes += sum(margins.values())
        totals.retries += sum(done.retries for done in rounds)
        values = {"seconds/messaging": messaging, "bytes": float(n_bytes), "bytes/margins": float(sum(margins.values()))}
        values.update({f"bytes/margins/{m}": float(n) for m, n in margins.items()})
        values.update({f"seconds/{action}/{role}": round(answer.busy, 3) for done in rounds for (action, role), answer in done.answers.items()})
        return values


def _n_bytes(done: Round) -> int:
    return sum(answer.n_bytes for answer in done.answers.values())
