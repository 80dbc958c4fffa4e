"""The method in one process: teachers, then the distilled student. Never touches Flower; the oracle of the federation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckd_fed.analysis.users import user_table
from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.build import backbone_class, check_options
from ckd_fed.checkpoint import to_arrays
from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset, resolve_for_data, standin_notice
from ckd_fed.data.missing import check_hidden
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.errors import ConfigError
from ckd_fed.evaluation.tested import Tested
from ckd_fed.home import code_version, home
from ckd_fed.report.write import report_quietly
from ckd_fed.tracking import console
from ckd_fed.tracking.console import no_counterfactual_notice
from ckd_fed.tracking.record import Mirror, Record, read_rows, run_name, sole_writer
from ckd_fed.tracking.result import Outcome, RunResult
from ckd_fed.tracking.resume import find_run, resumed_config
from ckd_fed.tracking.wandb_mirror import wandb_mirror
from ckd_fed.training.build import build_fit, build_trainer, choose_device
from ckd_fed.training.fit import Fit
from ckd_fed.training.means import Values
from ckd_fed.training.memory import TeacherMemory
from ckd_fed.training.progress import Progress


def train(
    config: Config,
    write: Callable[[str], None] = console.write,
    mirrors: Sequence[Callable[[Path], Mirror]] = (),
    memory: TeacherMemory | None = None,
) -> RunResult:
    """Train teachers, the plain student if asked for, and the distilled student; test them; record everything.

    About once a minute the state is kept beside the record, so that a run that was ended goes on from there (``resume``, with the
    configuration that :func:`configure` gives) to the result that it would have had.

    Args:
        config: the run's configuration.
        write: prints one line.
        mirrors: of the record, beside W&B.
        memory: of teachers trained in earlier runs of this process, which are not trained again.

    Raises:
        CkdError: bad data or configuration, or a training that cannot go on.
    """
    check_options(config.backbone, config.model)
    choose_device(config.training.device)  # raises for one that is not there, before a run has taken the name
    dataset = open_dataset(config)
    check_hidden(config.data.hidden_shares, dataset.modalities)
    facts = {"modalities": list(dataset.modalities), "standin": dataset.standin, **deciding_facts(dataset)}
    directory = home(config) / "runs" / (config.resume or run_name(config))
    with sole_writer(directory):
        progress = Progress(directory, deciding_facts(dataset), resume=bool(config.resume))
        resume_at = progress.recorded if config.resume else None
        record = Record(directory, config, [*wandb_mirror(config, facts, write), *mirrors], write, resume_at=resume_at)
        try:
            if config.resume:
                record.row("resume", round=progress.number, **facts)
                write(f"{dataset.describe()}; going on after round {progress.number}, run directory: {directory}")
                memory = None  # it knows whole learners only
            else:
                record.start(dataset.describe(), **facts)
            return _train(config, dataset, record, progress, memory or TeacherMemory())
        except BaseException as error:
            record.fail(f"{type(error).__name__}: {error}")
            if progress.exists:
                write(f"to go on from the last state: ckd-fed train -c 'resume=\"{directory.name}\"'")
            raise
        finally:
            if config.tracking.report:
                report_quietly(record.directory, record.write)


def deciding_facts(dataset: Dataset) -> dict[str, Any]:
    """What a run's result depends on beside its configuration: split, features and code."""
    return {"split": dataset.fingerprint, "features": dataset.feature_fingerprints, "code": code_version()}


def configure(given: Mapping[str, Any]) -> Config:
    """The configuration of :func:`train`: resolved from overrides, or that of the run which ``resume`` among them names.

    Raises:
        ConfigError: a bad key or value; or the run to go on with is not there, is finished, or is a federation's.
    """
    asked = resolve(given)
    if not asked.resume:
        return resolve_for_data(given)
    directory = find_run(home(asked) / "runs", asked.resume)
    if (directory / "checkpoints/state.safetensors").is_file():
        raise ConfigError(f"resume: run {asked.resume!r} is a federation's; go on with it by `ckd-fed run` or `flwr run`")
    if any(row["event"] == "final" for row in read_rows(directory / "metrics.jsonl")):
        raise ConfigError(f"resume: run {asked.resume!r} is finished; its results are in {directory}")
    return resumed_config(directory, given)


def _train(config: Config, dataset: Dataset, record: Record, progress: Progress, memory: TeacherMemory) -> RunResult:
    if dataset.standin:
        record.write(standin_notice(config))
    result = RunResult(dataset.modalities, record.directory)
    if not backbone_class(config.backbone).scores_use_features:
        record.write(no_counterfactual_notice(config.backbone))
    tests: dict[str, Tested] = {}
    fits = _pretrain(config, dataset, record, result, progress, memory, tests)
    teachers = {m: fits[f"teacher/{m}"].trainer.joint_tables() for m in dataset.modalities if f"teacher/{m}" in fits}
    student = _distil(config, dataset, record, result, progress, teachers)
    tests["student"] = _test(student, "student", config, result)
    if config.evaluation.user_table:
        record.users(user_table(dataset.fingerprint, {role: tested.by_user for role, tested in tests.items()}))
    record.groups([row for tested in tests.values() for row in tested.by_user.groups])
    record.finish(result, progress.seconds())
    progress.remove()
    return result


def _pretrain(
    config: Config, dataset: Dataset, record: Record, result: RunResult, progress: Progress, memory: TeacherMemory, tests: dict[str, Tested]
) -> dict[str, Fit]:
    """Phase 1: every teacher, and the plain student if asked for, to convergence; each with its best restored."""
    roles: dict[str, tuple[str, ...]] = {f"teacher/{m}": (m,) for m in dataset.modalities} if config.distillation.enabled else {}
    if config.plain and config.distillation.enabled:
        roles["plain"] = dataset.modalities
    cache = home(config) / "cache"
    fits = {
        role: build_fit(config, build_trainer(config, dataset.of_modalities(modalities), role, cache=cache)) for role, modalities in roles.items()
    }
    progress.load("teachers", fits)
    while not all(fit.done for fit in fits.values()):
        progress.number += 1
        started = time.monotonic()
        reports = {}
        for role, fit in fits.items():
            if not fit.done:
                reports[role] = memory.advance(config, dataset, role, fit)
                if reports[role]:
                    reports[role][-1]["done"] = float(fit.done)
        record.pretraining_round(progress.number, reports, time.monotonic() - started)
        if not any(not fit.done and memory.remembers(config, dataset, role) for role, fit in fits.items()):
            progress.save("teachers", fits, record.position(), now=all(fit.done for fit in fits.values()))
    for role, fit in fits.items():
        fit.trainer.restore(fit.best)
        tests[role] = _test(fit, role, config, result)
    return fits


def _distil(config: Config, dataset: Dataset, record: Record, result: RunResult, progress: Progress, teachers: dict[str, Embeddings]) -> Fit:
    """Phase 2: the student, distilled from the teachers, or plain without them."""
    fit = build_fit(config, build_trainer(config, dataset, "student", distilled=bool(teachers), cache=home(config) / "cache"))
    dtype, bound = DTYPES[config.distillation.margin_dtype], config.distillation.margin_bound
    masks = fit.trainer.dataset.masks

    def sheets(steps: Sequence[StepTriples]) -> dict[str, np.ndarray]:
        return {m: margin_sheet(embeddings, steps, dtype, bound, masks.get(m)) for m, embeddings in teachers.items()}

    def report(row: Values) -> None:
        progress.number += 1
        record.distillation_round(progress.number, result.against_teachers(row, result.modalities), dataset.modalities)
        progress.save("student", {"student": fit}, record.position())

    progress.load("student", {"student": fit})
    fit.advance(sheets=sheets if teachers else None, on_validation=report)
    record.checkpoint("last", to_arrays(fit.trainer.snapshot()), epoch=fit.epoch, round=progress.number)
    record.checkpoint("best", to_arrays(fit.best), epoch=fit.stopping.best_epoch)
    fit.trainer.restore(fit.best)
    return fit


def _test(fit: Fit, role: str, config: Config, result: RunResult) -> Tested:
    """Test the best parameters, which the fit has restored."""
    tested = fit.trainer.test(role, calibrated=config.evaluation.calibrate)
    stopping = fit.stopping
    result.outcomes[role] = Outcome(stopping.best_epoch, fit.epoch, stopping.best, tested.metrics.compute(), dict(tested.chosen))
    return tested
