"""The paper's diagnosis in numbers: each modality alone, inside the plain student, inside the distilled student."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckd_fed.analysis.history import RunHistory
from ckd_fed.evaluation.metrics import METRIC

TEACHER, PLAIN, DISTILLED = "alone (its teacher)", "inside the plain student", "inside the distilled student"


@dataclass(frozen=True)
class Diagnosis:
    """Recall@20 of every modality by where it was measured.

    Attributes:
        where: ``the test set``, or validation for a run without a test.
        views: modality -> source (alone, inside the plain student, inside the distilled student) -> Recall@20.
        joint: student -> Recall@20 with all modalities together.
    """

    where: str
    views: dict[str, dict[str, float]]
    joint: dict[str, float] = field(default_factory=dict)

    @property
    def has_teachers(self) -> bool:
        return any(TEACHER in values for values in self.views.values())

    @property
    def has_views(self) -> bool:
        """Whether any student's view was measured; not so where the backbone's scores do not depend on features."""
        return any(set(values) - {TEACHER} for values in self.views.values())

    def bars(self, name: str) -> dict[str, float]:
        """Source -> Recall@20 of a modality, or of all together."""
        return self.views.get(name, self.joint)

    def reached(self, modality: str, source: str) -> float | None:
        """The share of the teacher's recall that a student's view has reached; None for the teacher itself or without one."""
        values = self.views.get(modality, {})
        if source == TEACHER or source not in values or not values.get(TEACHER):
            return None
        return values[source] / values[TEACHER]

    @staticmethod
    def plain_reached(history: RunHistory, modality: str) -> float | None:
        """The share that the plain student's view had reached at its best validation; None without one."""
        rows = [row for row in history.learners.get("plain", []) if row.get(f"val/{METRIC}") is not None]
        teacher = _best_teacher(history, modality)
        if not rows or not teacher:
            return None
        best = max(rows, key=lambda row: row[f"val/{METRIC}"])
        view = best.get(f"only/{modality}/{METRIC}")
        return None if view is None else float(view) / teacher


def diagnose(history: RunHistory) -> Diagnosis | None:
    """The diagnosis of a run: on the test set where it was tested, else by its best validations; None without any view's recall."""
    found = _tested(history) if history.final else _validated(history)
    views = {m: values for m, values in found.views.items() if values}
    return Diagnosis(found.where, views, found.joint) if views else None


def _sources(history: RunHistory) -> dict[str, str]:
    """Model -> what its views are called; a student without teachers is a plain one."""
    return {"plain": PLAIN, "student": DISTILLED} if history.distilled else {"student": PLAIN}


def _tested(history: RunHistory) -> Diagnosis:
    tests = {source: history.tested(model) for model, source in _sources(history).items()}
    views = {}
    for m in history.modalities:
        values = {TEACHER: history.tested(f"teacher/{m}").get(METRIC), **{source: test.get(f"only/{m}/{METRIC}") for source, test in tests.items()}}
        views[m] = {source: value for source, value in values.items() if value is not None}
    return Diagnosis("the test set", views, {source: test[METRIC] for source, test in tests.items() if METRIC in test})


def _validated(history: RunHistory) -> Diagnosis:
    rows = {"plain": history.learners.get("plain", []), "student": history.distillation}
    best = {source: max(rows[model], key=lambda row: row.get(f"val/{METRIC}") or -1.0) for model, source in _sources(history).items() if rows[model]}
    views = {}
    for m in history.modalities:
        values = {TEACHER: _best_teacher(history, m), **{source: row.get(f"only/{m}/{METRIC}") for source, row in best.items()}}
        views[m] = {source: value for source, value in values.items() if value is not None}
    joint = {source: row[f"val/{METRIC}"] for source, row in best.items() if row.get(f"val/{METRIC}") is not None}
    return Diagnosis("validation (the run was not tested)", views, joint)


def _best_teacher(history: RunHistory, modality: str) -> float | None:
    values = [row[f"val/{METRIC}"] for row in history.learners.get(f"teacher/{modality}", []) if row.get(f"val/{METRIC}") is not None]
    return max(values) if values else None
