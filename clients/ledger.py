"""What a teacher gave away: a line for every sheet of margins, and the limits that it holds the server to.

The triples of a run follow from its split, seed, batch sizes and number of epochs. A teacher fixes these at a run's first request and
answers for no other triples after that. A request for an epoch that the same model answered before gives nothing new away and counts
nothing; margins of another model count, whatever made the server ask for it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckd_fed.errors import ReplyError
from ckd_fed.tracking.record import read_rows


class Ledger:
    """The answers of one teacher in one run: ``<home>/answers/teacher-<m>/<run>.jsonl``.

    Not in the run's workspace: that one is deleted, while what was given away stays given.

    The first line holds the agreement, each further one an answer: ``time``, ``round``, ``from_epoch``, ``epochs``, ``by`` (which model, as
    a fingerprint), ``margins`` (sent), ``new`` (of those, for triples that this model had not answered for) and ``triples`` (hashes).

    Args:
        folder: of the teacher's answers in all runs.
        run: name of the run.
        budget: new margins that this node gives away in all its runs for this modality together; 0 for no limit.
    """

    def __init__(self, folder: Path, run: str, budget: int = 0) -> None:
        self.path = folder / f"{run}.jsonl"
        self.budget = budget
        self._rows = self._read(self.path) if self.path.is_file() else []

    def admit(self, agreement: Mapping[str, Any], first: int, epochs: int, per_epoch: int, by: str) -> int:
        """Decide whether margins may be given for some epochs.

        Args:
            agreement: what decides the run's triples; ``epochs`` among it is how many epochs the run has at most.
            first: epoch of the stretch, from 0.
            epochs: of the stretch.
            per_epoch: margins of an epoch.
            by: fingerprint of the model whose margins they are.

        Returns:
            How many of the margins would be new.

        Raises:
            ReplyError: another stream than agreed, epochs outside it, or a budget that would be exceeded.
        """
        agreed = next((row["agreement"] for row in self._rows if "agreement" in row), None)
        if agreed is None:
            self._append({"agreement": dict(agreement), "time": _now()})
        elif agreed != dict(agreement):
            different = ", ".join(
                f"{key} {agreement.get(key)!r} instead of {value!r}" for key, value in agreed.items() if agreement.get(key) != value
            )
            raise ReplyError(f"margins are asked for of other triples than this run began with ({different}); this teacher refuses")
        if first < 0 or epochs < 1 or first + epochs > agreement["epochs"]:
            raise ReplyError(f"margins are asked for of epochs {first} to {first + epochs - 1}; this run has {agreement['epochs']} epochs")
        answers = [row for row in self._rows if "margins" in row and row.get("by") == by]
        given = {epoch for row in answers for epoch in range(row["from_epoch"], row["from_epoch"] + row["epochs"])}
        new = len(set(range(first, first + epochs)) - given) * per_epoch
        if self.budget and new:
            spent = sum(row.get("new", 0) for path in sorted(self.path.parent.glob("*.jsonl")) for row in self._read(path))
            if spent + new > self.budget:
                raise ReplyError(
                    f"score-budget: this teacher gave {spent} margins, {new} more would exceed {self.budget}; "
                    "raise score-budget in its node-config if they are to be given"
                )
        return new

    def note(self, **values: Any) -> None:
        """Write down an answer, before it leaves."""
        self._append({"time": _now(), **values})

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        try:
            return [dict(row) for row in read_rows(path)]
        except (ValueError, TypeError) as error:
            raise ReplyError(f"{path}, where this teacher wrote down what it gave, is damaged ({error}); mend it before it gives more") from None

    def _append(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a line that a crash cut short
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows.append(row)


def _now() -> float:
    return round(time.time(), 3)
