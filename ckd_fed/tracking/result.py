"""What a run arrived at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckd_fed.evaluation.metrics import METRIC

_VAL = "readout/val/"

# Prefixes of test metrics that are of other rankings than the joint one over all items, in words.
OTHER_RANKINGS = {"calibrated/": "its views, calibrated", "warm/": "among trained items", "cold/": "among items never trained"}


@dataclass
class Outcome:
    """How one model of a run ended.

    Attributes:
        best_epoch: epoch of the best validation.
        epochs: epochs trained.
        validation: the best Recall@20 on validation.
        test: metrics on test, ``only/m/...`` included for a student; with a split that holds items out of training also ``warm/...`` and
            ``cold/...``.
        readout: what was chosen on validation to read a student out, see :meth:`~ckd_fed.training.trainer.Trainer.read_out`; empty
            without ``evaluation.calibrate``.
    """

    best_epoch: int
    epochs: int
    validation: float
    test: dict[str, float]
    readout: dict[str, float] = field(default_factory=dict)

    def best_view(self) -> str:
        """The view that ranks best on validation, calibration aside: ``joint`` or ``only m``; empty without a read-out."""
        recalls = {name.removeprefix(_VAL): value for name, value in self.readout.items() if name.startswith(_VAL)}
        recalls.pop("calibrated", None)
        return max(recalls, key=recalls.__getitem__, default="")


@dataclass
class RunResult:
    """Everything that a run arrived at, by name: ``teacher/<m>``, ``plain``, ``student``.

    Attributes:
        outcomes: name -> outcome.
        modalities: in order.
        directory: of the run.
    """

    modalities: tuple[str, ...]
    directory: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def against_teachers(self, row: Mapping[str, float], teachers: Iterable[str]) -> dict[str, float]:
        """A student's row with each teacher's validation recall, and how much of it the student's ``only m`` view has reached.

        Args:
            row: with ``only/m/recall@20`` where the views differ.
            teachers: modalities that have one; those without an outcome are passed over.
        """
        values = dict(row)
        for m in teachers:
            teacher = self.outcomes.get(f"teacher/{m}")
            if teacher:
                values[f"teacher/{m}/{METRIC}"] = teacher.validation
                if f"only/{m}/{METRIC}" in values:
                    values[f"reached/{m}"] = ratio(values[f"only/{m}/{METRIC}"], teacher.validation)
        return values

    def summary(self) -> dict[str, float]:
        """Flat numbers for ``metrics.jsonl`` and W&B: ``final/<name>/<metric>`` and ``final/reached/<m>``."""
        flat: dict[str, float] = {}
        for name, outcome in self.outcomes.items():
            flat[f"final/{name}/best_epoch"] = outcome.best_epoch
            flat[f"final/{name}/val/{METRIC}"] = outcome.validation
            flat.update({f"final/{name}/test/{metric}": value for metric, value in outcome.test.items()})
            flat.update({f"final/{name}/{choice}": value for choice, value in outcome.readout.items()})
        flat.update({f"final/reached/{m}": value for m, value in self.reached("student").items()})
        return flat

    def reached(self, student: str) -> dict[str, float]:
        """Modality -> Recall@20 of the student's ``only m`` ranking over its teacher's, on test: 1 = fully optimised."""
        ratios = {}
        for m in self.modalities:
            teacher, taught = self.outcomes.get(f"teacher/{m}"), self.outcomes.get(student)
            if teacher and taught and f"only/{m}/{METRIC}" in taught.test:
                ratios[m] = ratio(taught.test[f"only/{m}/{METRIC}"], teacher.test[METRIC])
        return ratios


def ratio(reached: float, possible: float) -> float:
    """reached / possible; 0 where nothing was possible."""
    return reached / possible if possible > 0 else 0.0
