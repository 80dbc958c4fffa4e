"""The second phase of a run: the student is distilled, then tested."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ckd_fed.analysis.users import user_table
from ckd_fed.errors import DataError, ReplyError
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.evaluation.tested import merge_shares
from ckd_fed.tracking.result import Outcome
from ckd_fed.training.fit import validations_due
from server.checks import Sheets, check_sheets, check_worker, disagreement
from server.evaluation import Evaluation
from server.exchange import Ask
from server.recovery import Round
from server.reweighting import Reweighting
from server.rounds import Rounds
from server.stretch import sheet_bytes, stretch_epochs
from server.students import LoneStudent, SeveralStudents


class Distillation:
    """Exchanges in which the students train on the teachers' margins, while the teachers make those of the next one.

    Args:
        rounds: of the run.

    Attributes:
        reweighting: effects and weights of every round.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._config, self._state, self._plan = rounds.config, rounds.state, rounds.plan
        self.reweighting = Reweighting(tuple(rounds.weighed(rounds.teachers)), rounds.state.reweighting)
        self._evaluation = Evaluation(rounds)
        self._sheet_bytes = sheet_bytes(rounds.config, rounds.plan.card.n_train)

    def run(self) -> None:
        """From where the state stands, to the student's test."""
        if self._state.workers == 1:
            self._train(LoneStudent(self._rounds, self.reweighting))
        else:
            students = SeveralStudents(self._rounds, self.reweighting, self._evaluation)
            self._train(students)
            if self._state.awaited:  # the last epoch is over, so there is no round to validate with
                started = time.monotonic()
                done, shares = self._evaluation.ask(self._state.last, "val")
                students.take_validation(self._evaluation.validation(shares), time.monotonic() - started, done)
                self._rounds.checkpoint()
        self._test()

    def _train(self, students: LoneStudent | SeveralStudents) -> None:
        """Exchanges until early stopping or the last epoch: the margins of the next one are fetched while this one trains."""
        config, state, run = self._config, self._state, self._rounds
        sheets: dict[str, Sheets] = {}
        epochs = self._stretch(state.epoch)
        while epochs and not state.stopping.stop:
            started = time.monotonic()
            first = Round()
            if run.teachers and not sheets:
                first = run.ask(self._score_asks(state.epoch, epochs, state.number + 1))
                sheets = self._agreed(first, state.epoch, epochs, state.number + 1)
            following = self._stretch(state.epoch + epochs)
            planned = len(validations_due(config.training.validate_every, config.training.epochs, state.epoch, state.epoch + epochs))
            ahead = self._score_asks(state.epoch + epochs, following, state.number + 1 + max(1, planned))
            self.reweighting.modalities = tuple(run.weighed(sheets))
            done = run.ask([*self._distil_asks(epochs, sheets), *ahead])
            students.take(done, epochs, bool(planned), time.monotonic() - started, [first, done])
            run.checkpoint()
            wanted = ahead and run.teachers and not state.stopping.stop
            sheets = self._agreed(done, state.epoch, following, state.number + 1) if wanted else {}
            epochs = following

    def _stretch(self, epoch: int) -> int:
        """Epochs of the exchange that starts at an epoch. Several workers are averaged after each, so there it would change the result."""
        return stretch_epochs(self._config, epoch, self._state.stretch, self._sheet_bytes if self._rounds.teachers else 0)

    def _share(self, worker: int) -> int:
        """Steps of an epoch that are a worker's."""
        return len(range(worker, self._rounds.steps, self._state.workers))

    def _score_asks(self, epoch: int, epochs: int, number: int) -> list[Ask]:
        """Ask all teachers for the margins of a stretch; none if there is none."""
        if not epochs:
            return []
        values = {"from-epoch": epoch, "epochs": epochs, "workers": self._state.workers}
        steps = [epochs * self._share(worker) for worker in range(self._state.workers)]
        check = partial(check_sheets, config=self._config, steps=steps)
        roles = [f"teacher/{m}" for m in self._rounds.teachers]
        return [Ask(number, "score", role, values={**values, **self._rounds.best_of(role)}, check=check) for role in roles]

    def _agreed(self, done: Round, epoch: int, epochs: int, number: int) -> dict[str, Sheets]:
        """The sheets of all teachers, asked for again where they are bound to different triples.

        Raises:
            ReplyError: they still are after ``federation.retry-limit`` tries.
        """
        tries = self._config.federation.retry_limit
        while True:
            sheets: dict[str, Sheets] = {m: done.value("score", f"teacher/{m}") for m in self._rounds.teachers}
            reason = disagreement(sheets)
            if not reason:
                return sheets
            if not tries:
                raise ReplyError(reason)
            tries -= 1
            self._rounds.record.write(f"{reason}; asking them again")
            done = self._rounds.ask(self._score_asks(epoch, epochs, number))

    def _distil_asks(self, epochs: int, sheets: Mapping[str, Sheets]) -> list[Ask]:
        """Ask every student to train its share of a stretch."""
        state, run = self._state, self._rounds
        weighed = run.weighed(sheets)
        required = ["loss/total", *(f"{kind}/{m}" for kind in ("specific", "generic") for m in sheets)]
        required += [f"{kind}/{m}" for kind in ("effect", "weight") for m in weighed]
        if state.workers == 1:
            required += [f"val/{METRIC}", *(f"only/{m}/{METRIC}" for m in run.weighed(self._plan.modalities))]
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
                config=self._config,
                before=state.epoch,
                epochs=epochs,
                steps=self._share(worker),
                required=required,
                taught=weighed,
                like=state.last or None,
                stopping=replace(state.stopping) if state.workers == 1 else None,
                whole=self._plan.whole and not self._config.data.hidden_shares,
                evaluation=self._evaluation.check(worker) if state.awaited else None,
            )
            asks.append(Ask(state.number + 1, "distil", f"student/{worker}", arrays, values, check))
        return asks

    def _test(self) -> None:
        """Test the best student; the tables of all tests."""
        state, record = self._state, self._rounds.record
        _, shares = self._evaluation.ask(state.best, "test")
        readout = {name: value for share in shares for name, value in share.readout.items()}
        test = self._evaluation.means(shares)
        state.outcomes["student"] = Outcome(state.stopping.best_epoch, state.epoch, state.stopping.best, test, readout)
        state.tested["student"] = merge_shares([share.by_user for share in shares if share.by_user])
        if self._config.evaluation.user_table:
            self._write_users()
        record.groups([row for by_user in state.tested.values() for row in by_user.groups])

    def _write_users(self) -> None:
        """Write the table of the test's users. A node may have sent the ids of others than it tested: then the run ends without the table."""
        record = self._rounds.record
        try:
            record.users(user_table(self._plan.card.split, self._state.tested))
        except DataError as error:
            record.write(f"NOTE: there is no test_users.npz: {error}; `ckd-fed compare` will lack this run")
