"""Run a sweep, run by run, so that it can be broken off and taken up at any time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ckd_fed.analysis.history import RunHistory, read_history
from ckd_fed.config import Config
from ckd_fed.data.locate import resolve_for_data
from ckd_fed.errors import CkdError, ConfigError
from ckd_fed.experiments.recipe import Job
from ckd_fed.home import home
from ckd_fed.training.central import train
from ckd_fed.training.memory import TeacherMemory

_IRRELEVANT = ("tracking.", "training.threads", "training.device", "home", "data.dir")  # may differ between runs that are compared


def run_jobs(planned: Sequence[Job], done: Callable[[Job, str], None], write: Callable[[str], None]) -> dict[Job, RunHistory]:
    """Run what has not finished yet.

    Variants of a seed share the teachers that are the same for them. A run that finished with the same configuration is taken as it is;
    one that broke off or failed is begun anew, its folder replaced. A run that fails does not keep the others from running.

    Args:
        planned: of :func:`~ckd_fed.experiments.recipe.jobs`.
        done: told of every job as it ends, and how: ``kept``, ``finished`` or ``failed: <reason>``.
        write: prints one line.

    Returns:
        The histories of the jobs that finished.

    Raises:
        ConfigError: a configuration is impossible, or a finished run of the same name has another one (before anything is run).
    """
    configs = {job: resolve_for_data(job.overrides) for job in planned}
    kept = {job: history for job in planned if (history := _finished(job, configs[job])) is not None}
    found: dict[Job, RunHistory] = {}
    memory, place = TeacherMemory(), None
    for job in planned:
        if place != (job.dataset, job.backbone, job.seed):  # other teachers; forget those of before
            memory, place = TeacherMemory(), (job.dataset, job.backbone, job.seed)
        if job in kept:
            found[job] = kept[job]
            done(job, "kept")
            continue
        directory = _directory(job, configs[job])
        if directory.exists():
            write(f"{job.run} had broken off; it is begun anew")
            shutil.rmtree(directory)
        try:
            train(configs[job], write=lambda line: None, memory=memory)
        except CkdError as error:
            done(job, f"failed: {error}")
            continue
        found[job] = read_history(directory)
        done(job, "finished")
    return found


def _directory(job: Job, config: Config) -> Path:
    return home(config) / "runs" / job.run


def _finished(job: Job, config: Config) -> RunHistory | None:
    directory = _directory(job, config)
    if not (directory / "metrics.jsonl").is_file() or not (history := read_history(directory)).final:
        return None
    # through YAML, as the stored one has gone
    wanted = {key: value for key, value in _flat(yaml.safe_load(config.to_yaml())).items() if not key.startswith(_IRRELEVANT)}
    different = sorted(key for key, value in wanted.items() if history.config.get(key, value) != value)
    if different:
        shown = ", ".join(f"{key} {history.config[key]!r} instead of {wanted[key]!r}" for key in different[:4])
        raise ConfigError(f"{directory} holds a finished run with another configuration ({shown}); remove it, or use the sweep's first configuration")
    return history


def _flat(tree: dict[str, object]) -> dict[str, object]:
    from ckd_fed.config import flatten

    return {key.replace("_", "-"): value for key, value in flatten(tree).items()}
