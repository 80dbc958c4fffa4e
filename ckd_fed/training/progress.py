"""Where a run in one process stands on disk, so that it can be gone on with after it was ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.checkpoint import load_checkpoint, load_state, save_checkpoint
from ckd_fed.errors import ConfigError, DataError
from ckd_fed.training.fit import Fit
from ckd_fed.training.fit_state import fit_state, restore_fit

PAUSE = 60.0  # seconds between two states at least: a large model takes one to write, and no more than this is trained again
PHASES = ("teachers", "student")  # a file each, so that the student's does not write the teachers again


class Progress:
    """The states of a run's fits, ``checkpoints/<phase>-state.safetensors``, each replaced atomically.

    Args:
        directory: of the run.
        facts: what the result depends on beside the configuration: a state of other facts is refused.
        resume: go on from the states that are there; otherwise they are passed over.

    Attributes:
        number: of the last round, over both phases; whoever makes a round counts it here.
        recorded: bytes of ``metrics.jsonl`` that are accounted for; 0 where nothing was saved.
        elapsed: seconds that the run had taken until then.

    Raises:
        DataError: nothing was saved, or a file is damaged.
        ConfigError: the run began with other facts.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any], *, resume: bool = False) -> None:
        self._directory = directory / "checkpoints"
        self._facts = dict(facts)
        self._begun = self._saved = time.monotonic()
        self.number = self.recorded = 0
        self.elapsed = 0.0
        self._found: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {}
        if not resume:
            return
        for phase in self._phases():
            self._found[phase] = load_checkpoint(self._path(phase))
            values = self._found[phase][1]
            if different := _different(values["facts"], facts):
                raise ConfigError(f"resume: the run began with other {different}; go on with the same, or start a new run")
            self.number, self.recorded, self.elapsed = values["number"], values["recorded"], values["elapsed"]
        if not self._found:
            raise DataError(f"resume: {self._directory} holds no state to go on from (one is left after a minute of training); start the run afresh")

    @classmethod
    def left_by(cls, directory: Path, facts: Mapping[str, Any]) -> bool:
        """Whether a run that broke off left states to go on from, and of the same facts."""
        progress = cls(directory, facts)
        try:
            states = [load_state(progress._path(phase)) for phase in progress._phases()]
            written = (directory / "metrics.jsonl").stat().st_size
            return bool(states) and all(state["recorded"] <= written and not _different(state["facts"], facts) for state in states)
        except (DataError, OSError, KeyError, TypeError, AttributeError):
            return False

    def _phases(self) -> list[str]:
        return [phase for phase in PHASES if self._path(phase).is_file()]

    def _path(self, phase: str) -> Path:
        return self._directory / f"{phase}-state.safetensors"

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return bool(self._phases())

    def load(self, phase: str, fits: Mapping[str, Fit]) -> bool:
        """Put a phase's fits where they were; whether anything was saved of it.

        Raises:
            DataError: the state does not fit them.
        """
        if phase not in self._found:
            return False
        arrays, values = self._found.pop(phase)
        for role, fit in fits.items():
            try:
                restore_fit(fit, arrays, values["fits"][role], f"{role}/")
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise DataError(f"{self._path(phase)} does not fit this run's {role}: {str(error).splitlines()[0]}") from None
        return True

    def save(self, phase: str, fits: Mapping[str, Fit], recorded: int, *, now: bool = False) -> None:
        """Write a phase's fits, unless that was done less than :data:`PAUSE` seconds ago.

        Args:
            phase: of :data:`PHASES`.
            fits: role -> its fit.
            recorded: bytes of ``metrics.jsonl``, up to the rows of round :attr:`number`.
            now: whatever the time.
        """
        if not now and time.monotonic() - self._saved < PAUSE:
            return
        arrays: dict[str, np.ndarray] = {}
        states = {}
        for role, fit in fits.items():
            own, states[role] = fit_state(fit, f"{role}/")
            arrays.update(own)
        values = {"facts": self._facts, "number": self.number, "recorded": recorded, "elapsed": self.seconds(), "fits": states}
        save_checkpoint(self._path(phase), arrays, values)
        self._saved = time.monotonic()

    def seconds(self) -> float:
        """What the run has taken, over all processes that worked on it."""
        return self.elapsed + time.monotonic() - self._begun

    def remove(self) -> None:
        """Delete the states of a run that is finished."""
        for phase in PHASES:
            self._path(phase).unlink(missing_ok=True)


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first of some facts that are not the same; empty if all are."""
    return next((what for what, value in before.items() if value != now.get(what)), "")
