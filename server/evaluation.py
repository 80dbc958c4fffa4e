"""Evaluations of the student, each worker a share of the users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from ckd_fed.evaluation.metrics import METRIC, RankingMetrics, metric_keys
from ckd_fed.wire import Reply
from server.checks import Sums, check_evaluation
from server.exchange import Ask
from server.recovery import Round
from server.rounds import Rounds


class Evaluation:
    """What is asked of the workers, how their shares are checked, and what they come to together.

    Args:
        rounds: of the run.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def check(self, worker: int, *, test: bool = False) -> Callable[[Reply], Sums]:
        """The check of a worker's share."""
        run = self._rounds
        required = [*metric_keys(run.config.ks), *(f"only/{m}/{METRIC}" for m in run.weighed(run.plan.modalities))]
        share = worker, run.state.workers
        return partial(check_evaluation, config=run.config, required=required, card=run.plan.card, share=share, test=test)

    def ask(self, weights: Mapping[str, np.ndarray], split: str) -> tuple[Round, list[Sums]]:
        """Rank with some weights on ``val`` or ``test``: the round, and each worker's share."""
        state, asks = self._rounds.state, []
        arrays = {f"weights/{name}": array for name, array in weights.items()}
        for worker in range(state.workers):
            values = {"split": split, "worker": worker, "workers": state.workers}
            asks.append(Ask(state.number, "evaluate", f"student/{worker}", arrays, values, self.check(worker, test=split == "test")))
        done = self._rounds.ask(asks)
        return done, [done.value("evaluate", ask.role) for ask in asks]

    def means(self, shares: Iterable[Sums]) -> dict[str, float]:
        """Means over the users of all shares: of the joint view ``<metric>``, and ``only/m/<metric>``, ``calibrated/<metric>`` and so on."""
        metrics = RankingMetrics(self._rounds.config.ks)
        for share in shares:
            metrics.merge(share.sums, share.n_users)
        return metrics.compute()

    def validation(self, shares: Iterable[Sums]) -> dict[str, float]:
        """The same for a row of the record: those of the joint view as ``val/<metric>``."""
        return {name if "/" in name else f"val/{name}": value for name, value in self.means(shares).items()}
