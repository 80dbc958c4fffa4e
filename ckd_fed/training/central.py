"""The method in one process: teachers, then the distilled student. Never touches Flower; the oracle of the federation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ckd_fed.analysis.users import user_table
from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.build import backbone_class
from ckd_fed.checkpoint import to_arrays
from ckd_fed.config import Config
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset, standin_notice
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.evaluation.tested import Tested
from ckd_fed.home import code_version, home
from ckd_fed.report.write import report_quietly
from ckd_fed.tracking import console
from ckd_fed.tracking.console import no_counterfactual_notice
from ckd_fed.tracking.record import Mirror, Record, run_name
from ckd_fed.tracking.result import Outcome, RunResult, ratio
from ckd_fed.tracking.wandb_mirror import wandb_mirror
from ckd_fed.training.build import build_fit, build_trainer
from ckd_fed.training.fit import Fit
from ckd_fed.training.memory import TeacherMemory
from ckd_fed.training.trainer import METRIC, Values


def train(
    config: Config,
    write: Callable[[str], None] = console.write,
    mirrors: Sequence[Callable[[Path], Mirror]] = (),
    memory: TeacherMemory | None = None,
) -> RunResult:
    """Train teachers, the plain student if asked for, and the distilled student; test them; record everything.

    Args:
        config: the run's configuration.
        write: prints one line.
        mirrors: of the record, beside W&B.
        memory: of teachers trained in earlier runs of this process, which are not trained again.

    Raises:
        CkdError: bad data or configuration, or a training that cannot go on.
    """
    dataset = open_dataset(config)
    facts = {
        "modalities": list(dataset.modalities),
        "split": dataset.fingerprint,
        "standin": dataset.standin,
        "features": dataset.feature_fingerprints(),
        "code": code_version(),
    }
    record = Record(home(config) / "runs" / run_name(config), config, [*wandb_mirror(config, facts, write), *mirrors], write)
    try:
        record.start(dataset.describe(), **facts)
        return _train(config, dataset, record, memory or TeacherMemory())
    except BaseException as error:
        record.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        if config.tracking.report:
            report_quietly(record.directory, record.write)


def _train(config: Config, dataset: Dataset, record: Record, memory: TeacherMemory) -> RunResult:
    started = time.monotonic()
    if dataset.standin:
        record.write(standin_notice(config))
    result = RunResult(dataset.modalities, record.directory)
    if not backbone_class(config.backbone).scores_use_features:
        record.write(no_counterfactual_notice(config.backbone))
    tests: dict[str, Tested] = {}
    fits = _pretrain(config, dataset, record, result, memory, tests)
    number = max((round_number for round_number, _ in fits.values()), default=0)
    teachers = {m: fits[f"teacher/{m}"][1].trainer.soft_scores() for m in dataset.modalities if f"teacher/{m}" in fits}
    student = _distil(config, dataset, record, result, teachers, number)
    tests["student"] = _test(student, "student", config, result)
    if config.evaluation.user_table:
        record.users(user_table(dataset.fingerprint, {role: tested.by_user for role, tested in tests.items()}))
    record.groups([row for tested in tests.values() for row in tested.by_user.groups])
    record.finish(result, time.monotonic() - started)
    return result


def _pretrain(
    config: Config, dataset: Dataset, record: Record, result: RunResult, memory: TeacherMemory, tests: dict[str, Tested]
) -> dict[str, tuple[int, Fit]]:
    """Phase 1: every teacher, and the plain student if asked for, to convergence; (rounds taken, fit with the best restored)."""
    roles: dict[str, tuple[str, ...]] = {f"teacher/{m}": (m,) for m in dataset.modalities} if config.distillation.enabled else {}
    if config.plain and config.distillation.enabled:
        roles["plain"] = dataset.modalities
    fits = {role: build_fit(config, build_trainer(config, select(dataset, modalities), role)) for role, modalities in roles.items()}
    number = 0
    while not all(fit.done for fit in fits.values()):
        number += 1
        started = time.monotonic()
        reports = {}
        for role, fit in fits.items():
            if not fit.done:
                reports[role] = memory.advance(config, dataset, role, fit)
                if reports[role]:
                    reports[role][-1]["done"] = float(fit.done)
        record.pretraining_round(number, reports, time.monotonic() - started)
    for role, fit in fits.items():
        fit.trainer.restore(fit.best)
        tests[role] = _test(fit, role, config, result)
    return {role: (number, fit) for role, fit in fits.items()}


def _distil(config: Config, dataset: Dataset, record: Record, result: RunResult, teachers: dict[str, Embeddings], number: int) -> Fit:
    """Phase 2: the student, distilled from the teachers, or plain without them."""
    fit = build_fit(config, build_trainer(config, dataset, "student", distilled=bool(teachers)))
    dtype, bound = DTYPES[config.distillation.margin_dtype], config.distillation.margin_bound
    masks = fit.trainer.dataset.masks

    def sheets(steps: Sequence[StepTriples]) -> dict[str, np.ndarray]:
        return {m: margin_sheet(embeddings, steps, dtype, bound, masks.get(m)) for m, embeddings in teachers.items()}

    def report(row: Values) -> None:
        nonlocal number
        number += 1
        record.distillation_round(number, against_teachers(row, result), dataset.modalities)

    fit.advance(sheets=sheets if teachers else None, on_validation=report)
    record.checkpoint("last", to_arrays(fit.trainer.snapshot()), epoch=fit.epoch, round=number)
    record.checkpoint("best", to_arrays(fit.best), epoch=fit.stopping.best_epoch)
    fit.trainer.restore(fit.best)
    return fit


def select(dataset: Dataset, modalities: Sequence[str]) -> Dataset:
    """The same split with some of the modalities."""
    features = {m: dataset.features[m] for m in modalities}
    return dataclasses.replace(dataset, features=features, masks={m: mask for m, mask in dataset.masks.items() if m in features})


def against_teachers(row: Values, result: RunResult) -> Values:
    """A student's row with each teacher's validation recall and how much of it the student's ``only m`` view has reached."""
    row = dict(row)
    for m in result.modalities:
        teacher = result.outcomes.get(f"teacher/{m}")
        if teacher:
            row[f"teacher/{m}/{METRIC}"] = teacher.validation
            if f"only/{m}/{METRIC}" in row:
                row[f"reached/{m}"] = ratio(row[f"only/{m}/{METRIC}"], teacher.validation)
    return row


def _test(fit: Fit, role: str, config: Config, result: RunResult) -> Tested:
    """Test the best parameters, which the fit has restored."""
    tested = fit.trainer.test(role, calibrated=config.evaluation.calibrate and not role.startswith("teacher/"))
    stopping = fit.stopping
    result.outcomes[role] = Outcome(stopping.best_epoch, fit.epoch, stopping.best, tested.metrics.compute(), dict(tested.chosen))
    return tested
