"""One federated run: teacher rounds, distillation rounds, the end."""

from __future__ import annotations

from ckd_fed.tracking.record import Record
from ckd_fed.tracking.result import RunResult
from server.checkpoints import FINISHED, TEACHERS, RunState
from server.distillation import Distillation
from server.enrolment import Plan
from server.exchange import Exchange
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

    Attributes:
        rounds: what both phases share: plan, state, roster, result.
        distillation: the second phase, with effects and weights of every round.
    """

    def __init__(self, exchange: Exchange, plan: Plan, record: Record, state: RunState) -> None:
        self.rounds = Rounds(exchange, plan, record, state)
        self.distillation = Distillation(self.rounds)

    def run(self) -> RunResult:
        """Both phases from where the state stands, then the best student's test."""
        rounds, state = self.rounds, self.rounds.state
        if not state.number:
            rounds.checkpoint()  # from now on there is something to resume
        self._write_students()  # those there may be of a round that was not written down, and is done again now
        for m, reason in rounds.plan.lost.items():
            rounds.drop(m, reason)
        if state.phase == TEACHERS:
            Teaching(rounds).run()
        self.distillation.run()
        return rounds.result

    def finish(self) -> None:
        """Mark the run as finished, once its final row is written."""
        self.rounds.state.phase = FINISHED
        self.rounds.checkpoint()

    def _write_students(self) -> None:
        """Write the students of the state, for whoever uses them, as far as there are any."""
        state = self.rounds.state
        for name, parameters, epoch in (("best", state.best, state.stopping.best_epoch), ("last", state.last, state.epoch)):
            if parameters:
                self.rounds.record.checkpoint(name, parameters, epoch=epoch, round=state.number)
