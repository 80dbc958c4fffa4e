"""What both phases of a federated run share: asking, giving teachers up, totals and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from ckd_fed.config import Config
from ckd_fed.errors import ReplyError
from ckd_fed.tracking.record import Record
from ckd_fed.tracking.result import RunResult
from server.checkpoints import RunState, save_state
from server.enrolment import Plan
from server.exchange import Ask, Exchange
from server.recovery import Recovery, Round
from server.roster import Roster


class Rounds:
    """Requests of one run, and what comes of them for its state and its record.

    Args:
        exchange: with the nodes.
        plan: who plays which role.
        record: of the run.
        state: a new run's, or that of a run to go on with.

    Attributes:
        config: of the run.
        teachers: modalities that have one, in the order of the plan; those given up are left out.
        roster: which node plays which role now.
        result: what the run has arrived at.
        steps: of an epoch.
    """

    def __init__(self, exchange: Exchange, plan: Plan, record: Record, state: RunState) -> None:
        self.plan = plan
        self.record = record
        self.state = state
        self.config: Config = exchange.config
        self.teachers = [m for m in plan.modalities if m in {*plan.teachers, *plan.lost} and m not in state.dropped]
        self.roster = Roster(exchange, plan, record.write)
        self.result = RunResult(plan.modalities, record.directory, state.outcomes)
        self.steps = plan.card.n_train // self.config.training.batch_size + 1
        self._recovery = Recovery(exchange, self.roster, record.write)
        self._elapsed, self._started = state.elapsed, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds that this run has taken, in all its processes."""
        return self._elapsed + time.monotonic() - self._started

    def checkpoint(self) -> None:
        """Write down the state as of the last row of the record."""
        self.state.elapsed = self.elapsed
        self.state.recorded = self.record.position()
        save_state(self.record.directory, self.state)

    def ask(self, asks: Sequence[Ask]) -> Round:
        """Ask, and go on without the teachers that were given up.

        Raises:
            ReplyError: a request is given up whose role the run cannot do without.
        """
        done = self._recovery.ask(asks)
        for m, reason in done.lost.items():
            self.drop(m, reason)
        return done

    def drop(self, modality: str, reason: str) -> None:
        """Go on without a teacher: the weights of the others are normalised to their number by the objective.

        Raises:
            ReplyError: it was the last one.
        """
        self.teachers.remove(modality)
        self.state.learners.pop(f"teacher/{modality}", None)
        self.state.dropped[modality] = reason
        number = self.state.number + 1
        self.record.row("dropped", modality=modality, reason=reason, round=number)
        if not self.teachers:
            raise ReplyError(f"the last teacher is lost ({reason}); nothing is left to distil")
        self.record.write(f"!! teacher {modality} is DROPPED in round {number}: {reason}")
        self.record.write(f"!! going on with {', '.join(self.teachers)} (federation.on-lost-teacher=drop); weights are those of {len(self.teachers)}")

    def best_of(self, role: str) -> dict[str, float]:
        """Which parameters of a teacher are meant: a node that does not hold them trains up to them."""
        learner = self.state.learners[role]
        return {"best-epoch": learner.best_epoch, "best": learner.best}

    def weighed(self, modalities: Iterable[str]) -> list[str]:
        """Those modalities with effects, weights and views of their own: none where scores do not depend on features."""
        return list(modalities) if self.plan.card.counterfactual else []

    def add(self, seconds: float, *rounds: Round) -> dict[str, float]:
        """Add rounds to the totals; their numbers for the record."""
        totals = self.state.totals
        messaging = max(0.0, seconds - sum(done.busy for done in rounds))
        moved = sum(done.n_bytes for done in rounds)
        margins: dict[str, int] = {}
        for done in rounds:
            for (action, role), answer in done.answers.items():
                if action == "score":
                    m = role.removeprefix("teacher/")
                    margins[m] = margins.get(m, 0) + answer.n_bytes
        totals.seconds += seconds
        totals.messaging += messaging
        totals.n_bytes += moved
        totals.margin_bytes += sum(margins.values())
        totals.retries += sum(done.retries for done in rounds)
        values = {"seconds/messaging": messaging, "bytes": float(moved), "bytes/margins": float(sum(margins.values()))}
        values.update({f"bytes/margins/{m}": float(n) for m, n in margins.items()})
        values.update({f"seconds/{action}/{role}": round(answer.busy, 3) for done in rounds for (action, role), answer in done.answers.items()})
        return values
