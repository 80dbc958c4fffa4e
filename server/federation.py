"""One federated run: teacher rounds, distillation rounds, the end."""

from __future__ import annotations

from ckd_fed.tracking.record import Record
from ckd_fed.tracking.result import RunResult
from server.checkpoints import FINISHED, TEACHERS, RunState
from server.distillation import Distillation
from server.enrolment import Plan
from server.exchange import Exchange
from server.reweighting import Reweighting
from server.roster import Roster
from server.rounds import Rounds
from server.teaching import Teaching


class Federation:
    """Runs the two phases over an exchange, records them, and checkpoints every exchange.

    The server holds no features and trains nothing: it passes margins from teachers to students, averages the workers' parameters,
    merges their effects, decides when to stop and keeps the best student.

    Args:
        exchange: with the nodes.
        plan: who plays which role.
        record: of the run.
        state: a new run's, or that of a run to go on with.
    """

    def __init__(self, exchange: Exchange, plan: Plan, record: Record, state: RunState) -> None:
        self.config = exchange.config
        self.plan = plan
        self.record = record
        self.state = state
        self._rounds = Rounds(exchange, plan, record, state)
        self._distillation = Distillation(self._rounds)

    @property
    def teachers(self) -> list[str]:
        """Modalities that have a teacher now."""
        return self._rounds.teachers

    @property
    def roster(self) -> Roster:
        """Which node plays which role now."""
        return self._rounds.roster

    @property
    def reweighting(self) -> Reweighting:
        """Effects and weights of every round."""
        return self._distillation.reweighting

    @property
    def elapsed(self) -> float:
        """Seconds that this run has taken, in all its processes."""
        return self._rounds.elapsed

    def run(self) -> RunResult:
        """Both phases from where the state stands, then the best student's test."""
        if not self.state.number:
            self._rounds.checkpoint()  # from now on there is something to resume
        self._write_students()  # those there may be of a round that was not written down, and is done again now
        for m, reason in self.plan.lost.items():
            self._rounds.drop(m, reason)
        if self.state.phase == TEACHERS:
            Teaching(self._rounds).run()
        self._distillation.run()
        return self._rounds.result

    def finish(self) -> None:
        """Mark the run as finished, once its final row is written."""
        self.state.phase = FINISHED
        self._rounds.checkpoint()

    def _write_students(self) -> None:
        """Write the students of the state, for whoever uses them, as far as there are any."""
        state = self.state
        for name, parameters, epoch in (("best", state.best, state.stopping.best_epoch), ("last", state.last, state.epoch)):
            if parameters:
                self.record.checkpoint(name, parameters, epoch=epoch, round=state.number)
