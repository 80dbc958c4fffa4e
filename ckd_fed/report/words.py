"""What a run came to, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ckd_fed.analysis.history import RunHistory
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.report.diagnosis import DISTILLED, PLAIN, TEACHER, Diagnosis, diagnose
from ckd_fed.tracking.console import size

STARVED = 0.9  # a modality under this share of its teacher's recall is called starved


@dataclass(frozen=True)
class Words:
    """Sentences of a report: the answer first, then the imbalance, then how the run went."""

    verdict: str
    imbalance: list[str] = field(default_factory=list)
    course: list[str] = field(default_factory=list)


def describe(history: RunHistory) -> Words:
    """Put a run into words."""
    found = diagnose(history)
    return Words(_verdict(history, found), _imbalance(found), _course(history))


def _verdict(history: RunHistory, found: Diagnosis | None) -> str:
    if history.failure:
        return f"The run failed: {history.failure}"
    if history.state == "unfinished":
        return "The run has not finished: it is still going on, or was cut off. What follows is what it has recorded so far."
    if found is None or not found.has_teachers:
        test = history.tested("student").get(METRIC)
        return "A student without teachers was trained." + (f" Its Recall@20 on test is {test:.4f}." if test is not None else "")
    if not found.has_views:
        recalls = ", ".join(f"{value:.4f} {source}" for source, value in found.joint.items())
        return f"This backbone's scores do not depend on features, so no single modality can be seen in its students. Recall@20 on test: {recalls}."
    plain, distilled = found.joint.get(PLAIN), found.joint.get(DISTILLED)
    starved = _starved(found, PLAIN)
    if plain is None or distilled is None:
        still = _starved(found, DISTILLED)
        tail = f"{_listed(still)} {_is(still)} still starved." if still else "no modality is starved."
        return f"In the distilled student {tail}"
    change = f"Recall@20 on test {plain:.4f} without and {distilled:.4f} with distillation ({_percent(distilled, plain)})"
    if not starved:
        return f"Without distillation no modality was starved here. {change}."
    cured = [m for m in starved if (found.reached(m, DISTILLED) or 0) >= STARVED]
    left = [m for m in starved if m not in cured]
    told = f"Trained without distillation, the student starves {_listed(starved)} (under {STARVED:.0%} of the teacher). "
    if not left:
        told += "Distillation cured it. "
    elif any((found.reached(m, DISTILLED) or 0) > (found.reached(m, PLAIN) or 0) for m in left):
        told += f"Distillation helped, but {_listed(left)} {_is(left)} still behind {_its(left)} teacher. "
    else:
        told += f"Distillation did not cure {_listed(left)}. "
    return told + change + "."


def _imbalance(found: Diagnosis | None) -> list[str]:
    if found is None:
        return []
    said = []
    for m, values in found.views.items():
        if TEACHER not in values:
            continue
        parts = [f"{m}: alone it reaches a Recall@20 of {values[TEACHER]:.4f}"]
        for source in (PLAIN, DISTILLED):
            share = found.reached(m, source)
            if share is not None:
                parts.append(f"{source} {values[source]:.4f}, which is {share:.0%} of that")
        said.append("; ".join(parts) + ".")
    return said


def _course(history: RunHistory) -> list[str]:
    config, said = history.config, []
    who = f"{str(config.get('backbone', 'unknown backbone')).upper()}, seed {config.get('seed', '?')}"
    if config.get("recipe"):
        who += f", recipe {config['recipe']}"
    described = history.start.get("description") or f"dataset {config.get('dataset', 'unknown')}"
    said.append(f"{who}, on {described}.")
    if history.start.get("standin") or "stand-in" in str(described):
        said.append("The data are a generated stand-in, built to show the effect: its numbers mean nothing outside this program.")
    if history.distillation:
        last, best = history.distillation[-1], history.best
        at = next((row["epoch"] for row in history.distillation if row.get(f"val/{METRIC}") == best and best is not None), None)
        before = f"{_rounds(history.teacher_rounds)} of teachers, then " if history.teacher_rounds else ""
        phases = f"{before}{_rounds(history.distillation)} of the student ({last['epoch']:.0f} epochs)"
        said.append(phases + (f"; the student was best on validation at epoch {at:.0f}, with a Recall@20 of {best:.4f}." if at else "."))
    elif history.teacher_rounds:
        said.append(f"{_rounds(history.teacher_rounds)} of teachers; no round of the student was finished.")
    cost = f"It took {_duration(history.seconds)}"
    said.append(f"{cost}, and {size(history.bytes)} travelled." if history.bytes else f"{cost} in one process; nothing travelled.")
    taken = {name: sum(rounds.values()) for name, rounds in history.seconds_by_participant().items()}
    if len(taken) > 1:
        slowest = max(taken, key=lambda name: taken[name])
        said.append(f"The slowest was the {slowest}: {_duration(taken[slowest])} in all, waiting for others on its machine included.")
    return said


def _starved(found: Diagnosis, source: str) -> list[str]:
    return [m for m in found.views if (share := found.reached(m, source)) is not None and share < STARVED]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _its(names: list[str]) -> str:
    return "its" if len(names) == 1 else "their"


def _rounds(rows: Sequence[object]) -> str:
    return f"{len(rows)} round{'' if len(rows) == 1 else 's'}"


def _percent(new: float, old: float) -> str:
    return f"{new / old - 1:+.1%}" if old > 0 else "from nothing"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
