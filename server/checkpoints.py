"""A run's state on the server, and its checkpoint: one file that is replaced atomically at the end of every round."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.checkpoint import load_checkpoint, save_checkpoint
from ckd_fed.errors import DataError
from ckd_fed.evaluation.tested import UserTest
from ckd_fed.tracking.result import Outcome
from ckd_fed.training.early_stopping import EarlyStopping
from server.reweighting import RoundState

FILE = "state.safetensors"
_VERSION = 4
TEACHERS, DISTILLATION, FINISHED = "teachers", "distillation", "finished"


@dataclass
class Learner:
    """The server's view of a teacher or of the plain student."""

    epoch: int = 0
    best_epoch: int = 0
    best: float = 0.0
    done: bool = False
    width: int = 0  # of its embedding tables, known from its test


@dataclass
class Totals:
    """Sums over a run: wall time of its rounds, the part of it that no node worked, bytes, and requests sent again."""

    seconds: float = 0.0
    messaging: float = 0.0
    n_bytes: int = 0
    margin_bytes: int = 0
    retries: int = 0


@dataclass
class RunState:
    """Everything that the server knows of a run and cannot ask for again.

    Attributes:
        run: the run as the nodes know it.
        code: version of the code that wrote it.
        split: fingerprint of the split.
        features: ``student/<m>``, ``teacher/<m>`` -> fingerprint of its features.
        modalities, workers: of the student.
        stopping: early stopping of the student.
        phase: ``teachers``, ``distillation`` or ``finished``.
        number: of the last finished round, over both phases.
        epoch: of the student.
        learners: ``teacher/<m>`` and ``plain``.
        outcomes: results so far.
        dropped: modality -> why its teacher was given up.
        reweighting: round -> effects and weights.
        totals: sums over the rounds.
        elapsed: seconds of earlier processes of this run.
        recorded: bytes of ``metrics.jsonl`` that this state accounts for.
        last, best: the student's parameters; empty before its first round.
        tested: model -> its test by users and groups.
        stretch: validations that a round is to hold.
        awaited: the row of several workers' last round and its number, ``round``, whose validation comes with the next.
    """

    run: str
    code: str
    split: str
    features: dict[str, str]
    modalities: tuple[str, ...]
    workers: int
    stopping: EarlyStopping
    phase: str = TEACHERS
    number: int = 0
    epoch: int = 0
    learners: dict[str, Learner] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    reweighting: dict[int, RoundState] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    elapsed: float = 0.0
    recorded: int = 0
    last: dict[str, np.ndarray] = field(default_factory=dict)
    best: dict[str, np.ndarray] = field(default_factory=dict)
    tested: dict[str, UserTest] = field(default_factory=dict)
    stretch: int = 1
    awaited: dict[str, float] | None = None


def save_state(directory: Path, state: RunState) -> None:
    """Write a run's state into its directory, ``checkpoints/state.safetensors``; the old one stays whole until the new one is."""
    arrays = {f"{kind}/{name}": array for kind in ("last", "best") for name, array in getattr(state, kind).items()}
    for model, test in state.tested.items():
        arrays.update({f"tested/{model}/{name}": array for name, array in {"users": test.users, **test.values}.items()})
    save_checkpoint(directory / "checkpoints" / FILE, arrays, {"version": _VERSION, **asdict_without_arrays(state)})


def asdict_without_arrays(state: RunState) -> dict[str, Any]:
    """A state's JSON-able part."""
    shallow = {name: value for name, value in vars(state).items() if name not in ("last", "best", "tested")}
    shallow["stopping"] = {**asdict(state.stopping), "best": state.stopping.best if math.isfinite(state.stopping.best) else None}
    for name in ("learners", "outcomes", "reweighting"):
        shallow[name] = {str(key): asdict(value) for key, value in shallow[name].items()}
    groups = {model: test.groups for model, test in state.tested.items()}
    return {**shallow, "modalities": list(state.modalities), "totals": asdict(state.totals), "groups": groups}


def load_state(directory: Path) -> RunState:
    """Read what :func:`save_state` wrote.

    Raises:
        DataError: it is missing or damaged, or of another version of this framework.
    """
    path = directory / "checkpoints" / FILE
    arrays, plain = load_checkpoint(path)
    if plain.pop("version", None) != _VERSION:
        raise DataError(f"{path} was written by another version of ckd_fed; finish the run with the version that began it")
    try:
        best = plain["stopping"]["best"]
        plain["stopping"] = EarlyStopping(**{**plain["stopping"], "best": -math.inf if best is None else best})
        plain["learners"] = {role: Learner(**entry) for role, entry in plain["learners"].items()}
        plain["outcomes"] = {name: Outcome(**entry) for name, entry in plain["outcomes"].items()}
        plain["reweighting"] = {int(number): RoundState(**entry) for number, entry in plain["reweighting"].items()}
        plain["totals"] = Totals(**plain["totals"])
        plain["modalities"] = tuple(plain["modalities"])
        kinds: dict[str, Any] = {
            kind: {name.removeprefix(f"{kind}/"): a for name, a in arrays.items() if name.startswith(f"{kind}/")} for kind in ("last", "best")
        }
        tested = {model: _user_test(f"tested/{model}/", arrays, groups) for model, groups in plain.pop("groups").items()}
        return RunState(**plain, **kinds, tested=tested)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from None


def _user_test(prefix: str, arrays: dict[str, np.ndarray], groups: list[dict[str, Any]]) -> UserTest:
    values = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return UserTest(values.pop("users"), values, groups)
