"""A run as its ``metrics.jsonl`` tells it, whether it finished, failed, or is still going on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ckd_fed.analysis.locate import RECORD
from ckd_fed.data.dataset import Dataset
from ckd_fed.errors import DataError
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.tracking.record import read_rows

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunHistory:
    """Rows of a run, by what they say.

    Attributes:
        directory: of the run.
        config: the resolved configuration, dotted keys; empty where ``config.yaml`` is missing.
        rows: of ``metrics.jsonl``, in order.
    """

    directory: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        return self.directory.name

    @cached_property
    def start(self) -> Row:
        return next((row for row in self.rows if row["event"] == "start"), {})

    @cached_property
    def final(self) -> Row:
        """The last row of a finished run; empty for any other."""
        return next((row for row in reversed(self.rows) if row["event"] == "final"), {})

    @cached_property
    def failure(self) -> str:
        """Why the run failed; empty where it did not, or has been gone on with since."""
        last = next((row for row in reversed(self.rows) if row["event"] in ("final", "failed", "resume")), {})
        return str(last.get("reason", "no reason given")) if last.get("event") == "failed" else ""

    @property
    def state(self) -> str:
        """``finished``, ``failed``, or ``unfinished`` (still going on, or cut off)."""
        return "failed" if self.failure else "finished" if self.final else "unfinished"

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """In the run's order; as far as its rows tell for a run that failed early."""
        if self.start.get("modalities"):
            return tuple(self.start["modalities"])
        named = {key.split("/")[1] for row in self.rows for key in row if key.startswith(("teacher/", "only/"))}
        return tuple(sorted(named))

    @cached_property
    def distillation(self) -> list[Row]:
        """Rows of the distillation rounds, by round; of a round done twice (a resumed run) the later one."""
        rounds = {row["round"]: row for row in self.rows if row["event"] == "round" and row.get("phase") == "distillation"}
        return [rounds[number] for number in sorted(rounds)]

    @cached_property
    def teacher_rounds(self) -> list[Row]:
        """Rows of the teachers' rounds, by round."""
        rounds = {row["round"]: row for row in self.rows if row["event"] == "round" and row.get("phase") == "teachers"}
        return [rounds[number] for number in sorted(rounds)]

    @cached_property
    def learners(self) -> dict[str, list[Row]]:
        """``teacher/<m>`` and ``plain`` -> their validations by epoch, keys without the learner's name."""
        found: dict[str, dict[float, Row]] = {}
        for row in self.rows:
            if row["event"] != "validation":
                continue
            epoch = next((key for key in row if key.endswith("/epoch")), "")
            learner = epoch.removesuffix("/epoch")
            if learner and row[epoch] is not None:
                own = {key.removeprefix(f"{learner}/"): value for key, value in row.items()}
                found.setdefault(learner, {})[row[epoch]] = own
        return {learner: [rows[epoch] for epoch in sorted(rows)] for learner, rows in found.items()}

    @cached_property
    def distilled(self) -> bool:
        """Whether the student had teachers."""
        return bool(self.config.get("distillation.enabled", any(name.startswith("teacher/") for name in self.learners)))

    def tested(self, model: str) -> dict[str, float]:
        """Test metrics of ``teacher/<m>``, ``plain`` or ``student``; empty where it was not tested."""
        prefix = f"final/{model}/test/"
        return {key.removeprefix(prefix): value for key, value in self.final.items() if key.startswith(prefix) and value is not None}

    @cached_property
    def models(self) -> list[str]:
        """Models with a test, teachers first, then plain, then student."""
        order = [*(f"teacher/{m}" for m in self.modalities), "plain", "student"]
        return [name for name in order if self.tested(name)]

    @property
    def seconds(self) -> float:
        """Wall time: of a finished run as it says, of another from its first to its last row."""
        if self.final.get("seconds") is not None:
            return float(self.final["seconds"])
        return float(self.rows[-1]["time"] - self.rows[0]["time"]) if self.rows else 0.0

    @property
    def bytes(self) -> float:
        """Payload sent and received in all rounds; 0 for a run in one process."""
        return float(sum(row.get("bytes") or 0 for row in [*self.teacher_rounds, *self.distillation]))

    @cached_property
    def best(self) -> float | None:
        """The student's best Recall@20 on validation, None before its first."""
        values = [row[f"val/{METRIC}"] for row in self.distillation if row.get(f"val/{METRIC}") is not None]
        return max(values) if values else None

    def seconds_by_participant(self) -> dict[str, dict[int, float]]:
        """``teacher image`` and the like -> round -> seconds.

        A federated run's rounds say how long each node took to answer (``seconds/<action>/<role>``); otherwise a learner's training
        time is that of its validations, and a distillation round's is the student's.
        """
        found: dict[str, dict[int, float]] = {}

        def add(role: str, number: int, seconds: float) -> None:
            rounds = found.setdefault(role.replace("/", " ").replace("plain", "plain student"), {})
            rounds[number] = rounds.get(number, 0.0) + seconds

        timed_rounds = {row["round"] for row in self.teacher_rounds if any(_by_role(key) for key in row)}
        for learner, rows in self.learners.items():
            for row in rows:
                if row["round"] not in timed_rounds and row.get("seconds") is not None:
                    add(learner, row["round"], row["seconds"])
        for row in [*self.teacher_rounds, *self.distillation]:
            timed = {key.split("/", 2)[2]: value for key, value in row.items() if _by_role(key) and value is not None}
            for role, seconds in timed.items():
                add("student" if role == "student/0" and "seconds/distil/student/1" not in row else role, row["round"], seconds)
            if not timed and row.get("phase") == "distillation" and row.get("seconds") is not None:
                add("student", row["round"], row["seconds"])
        return found


def read_history(directory: Path) -> RunHistory:
    """Read a run's folder.

    Raises:
        DataError: ``metrics.jsonl`` is missing, damaged or holds no row.
    """
    path = directory / RECORD
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not rows or not all(isinstance(row, dict) and "event" in row for row in rows):
        raise DataError(f"{path} holds no rows of a run")
    return RunHistory(directory, _read_config(directory / "config.yaml"), rows)


def other_data(history: RunHistory, dataset: Dataset) -> str:
    """What a run was trained on, in words, where that is not the dataset at hand; empty where it is."""
    split, here = str(history.start.get("split")), dataset.feature_fingerprints
    if split != dataset.fingerprint:
        return f"another split ({split[:12]}) than the one in {dataset.directory} ({dataset.fingerprint[:12]})"
    recorded = history.start.get("features") or {}
    for modality in dict.fromkeys((*history.modalities, *here)):
        before, _, mask_before = str(recorded.get(modality)).partition("+")
        now, _, mask_now = str(here.get(modality)).partition("+")
        if before != now:
            return f"other {modality} features ({before[:12]}) than those in {dataset.directory} ({now[:12]})"
        if mask_before != mask_now:
            return f"another {modality} mask ({mask_before[:12] or 'none'}) than in {dataset.directory} ({mask_now[:12] or 'none'})"
    return ""


def _read_config(path: Path) -> dict[str, Any]:
    from ckd_fed.config import flatten

    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return {key.replace("_", "-"): value for key, value in flatten(tree if isinstance(tree, dict) else {}).items()}


def series(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of some rows, leaving out rows where either is missing or null."""
    pairs = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [float(first) for first, _ in pairs], [float(second) for _, second in pairs]


def _by_role(key: str) -> bool:
    """Whether a number is the seconds of one node, ``seconds/<action>/<role>`` (others are of the whole round)."""
    return key.startswith("seconds/") and key.count("/") >= 2
