"""The first phase of a run: teachers, and the plain student if asked for, to convergence."""

from __future__ import annotations

import time
from functools import partial

from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.tracking.result import Outcome
from server.checkpoints import DISTILLATION, Learner
from server.checks import FitReport, TestReport, check_fit, check_test
from server.exchange import Ask
from server.recovery import Round
from server.rounds import Rounds


class Teaching:
    """Rounds in which each learner trains for some epochs on its own node; then their tests.

    Args:
        rounds: of the run.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._config, self._state = rounds.config, rounds.state

    def run(self) -> None:
        """From where the state stands, until every learner has converged and is tested."""
        state = self._state
        if not state.learners:
            roles = [f"teacher/{m}" for m in self._rounds.teachers] + (["plain"] if self._config.plain and self._rounds.teachers else [])
            state.learners.update({role: Learner() for role in roles})
        while any(not learner.done for learner in state.learners.values()):
            self._train()
        self._test()
        state.phase = DISTILLATION
        self._rounds.checkpoint()

    def _train(self) -> None:
        """One round of those that have not converged."""
        state, started = self._state, time.monotonic()
        asks = [self._fit(role, learner) for role, learner in state.learners.items() if not learner.done]
        done = self._rounds.ask(asks)
        state.number += 1
        reports = {ask.role: self._taken(done.value("fit", ask.role), state.learners[ask.role]) for ask in asks if ask.role in state.learners}
        seconds = time.monotonic() - started
        self._rounds.add(seconds, done)
        self._rounds.record.pretraining_round(state.number, reports, seconds, done.n_bytes)
        self._rounds.checkpoint()

    def _fit(self, role: str, learner: Learner) -> Ask:
        values = {"from-epoch": learner.epoch, "epochs": self._config.teacher_round}
        check = partial(check_fit, config=self._config, before=learner.epoch)
        return Ask(self._state.number + 1, "fit", role, values=values, check=check)

    def _taken(self, report: FitReport, learner: Learner) -> list[dict[str, float]]:
        learner.epoch, learner.best_epoch, learner.done = report.epoch, report.best_epoch, report.done
        learner.best = max([learner.best, *(row[f"val/{METRIC}"] for row in report.rows)])
        report.rows[-1]["done"] = float(learner.done)
        return report.rows

    def _test(self) -> None:
        """Test the best of all."""
        state = self._state
        check = partial(check_test, config=self._config, card=self._rounds.plan.card)
        asks = [Ask(state.number, "test", role, values=self._rounds.best_of(role), check=check) for role in state.learners]
        done = self._rounds.ask(asks) if asks else Round()
        for role, learner in state.learners.items():
            report: TestReport = done.value("test", role)
            learner.width = report.width
            state.outcomes[role] = Outcome(learner.best_epoch, learner.epoch, learner.best, report.metrics, report.readout)
            state.tested[role] = report.by_user
