"""Run a sweep, run by run, so that it can be broken off and taken up at any time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml

from ckd_fed.analysis.history import RunHistory, other_data, read_history
from ckd_fed.backbones.build import check_options
from ckd_fed.config import Config, flatten
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import locate, open_dataset, resolve_for_data
from ckd_fed.errors import CkdError, ConfigError, DataError
from ckd_fed.experiments.recipe import Job
from ckd_fed.home import code_version, home
from ckd_fed.tracking.record import LOCK, sole_writer
from ckd_fed.tracking.resume import resumed_config
from ckd_fed.training.central import deciding_facts, train
from ckd_fed.training.memory import TeacherMemory
from ckd_fed.training.progress import Progress

_IRRELEVANT = (
    "tracking.",
    "training.threads",
    "training.device",
    "training.cuda-graphs",
    "home",
    "data.dir",
)  # may differ between runs that are compared; data by what is in them

_Datasets = dict[tuple[Path, tuple[str, ...]], Dataset]  # folder and modalities asked for -> the dataset, opened once


def run_jobs(
    planned: Sequence[Job], done: Callable[[Job, str], None], write: Callable[[str], None], at: Callable[[Job, str], None] = lambda job, line: None
) -> dict[Job, RunHistory]:
    """Run what has not finished yet.

    Variants of a seed share the teachers that are the same for them. A run that finished with the same configuration on the same data is taken
    as it is (a note says where other code made it). One that broke off goes on from the state that it left, if configuration, data and code
    are still the same; else, or where it left none or cannot be read, it is begun anew, its folder emptied. A run that another process is
    training fails here, and one that another finished meanwhile is taken as it is. A run that fails does not keep the others from running.

    Args:
        planned: of :func:`~ckd_fed.experiments.recipe.jobs`.
        done: told of every job as it ends, and how: ``kept``, ``finished`` or ``failed: <type>: <reason>``.
        write: prints one line.
        at: told what the job that is running would print, line by line.

    Returns:
        The histories of the jobs that finished.

    Raises:
        ConfigError: a configuration or an option of a backbone is impossible, or a finished run of the same name has another configuration, or
            other data (before anything is run).
    """
    configs = {job: resolve_for_data(job.overrides) for job in planned}
    opened: _Datasets = {}
    kept = {job: history for job in planned if (history := _finished(job, configs[job], opened)) is not None}
    for job in planned:
        if job not in kept:
            check_options(job.backbone, configs[job].model)
    found: dict[Job, RunHistory] = {}
    memory, place = TeacherMemory(), None
    for job in planned:
        if place != (job.dataset, job.backbone, job.seed):  # other teachers; forget those of before
            memory, place = TeacherMemory(), (job.dataset, job.backbone, job.seed)
        directory = _directory(job, configs[job])
        try:
            config = None if job in kept else _claimed(job, configs[job], directory, opened, write)
            if config is not None:
                train(config, write=partial(at, job), memory=memory)
            found[job] = kept[job] if job in kept else read_history(directory)
        except Exception as error:  # whatever it is, it is this run's own affair
            done(job, f"failed: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        if config is None and (made_by := found[job].start.get("code")) != code_version():
            write(f"NOTE: {job.run} was trained by other code ({made_by}, this is {code_version()}) and is kept; remove its folder to train it anew")
        done(job, "kept" if config is None else "finished")
    return found


def _claimed(job: Job, config: Config, directory: Path, opened: _Datasets, write: Callable[[str], None]) -> Config | None:
    """The configuration to train a run by, with ``resume`` if it had broken off and can go on; else what it left is deleted.

    None if another process has finished it since the sweep began.

    Raises:
        ConfigError: another process is training it.
    """
    if not directory.exists():
        return config
    with sole_writer(directory):
        if _finished(job, config, opened) is not None:
            return None
        config = _taken_up(config, directory, opened)
        write(f"{job.run} had broken off; it {'goes on from its last state' if config.resume else 'is begun anew'}")
        if not config.resume:
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
    return config


def _directory(job: Job, config: Config) -> Path:
    return home(config) / "runs" / job.run


def _taken_up(config: Config, directory: Path, opened: _Datasets) -> Config:
    """The configuration with ``resume``, if the directory holds a run of it that broke off and left a state; else as it is."""
    try:
        stored = resumed_config(directory, {"resume": directory.name})
    except (CkdError, OSError):  # no run, or a damaged one
        return config
    same = _relevant(_flat_of(stored)) == _relevant(_flat_of(dataclasses.replace(config, resume=directory.name)))
    return stored if same and Progress.left_by(directory, deciding_facts(_dataset(config, opened))) else config


def _dataset(config: Config, opened: _Datasets) -> Dataset:
    place = locate(config)[0], config.modalities
    if place not in opened:
        opened[place] = open_dataset(config)
    return opened[place]


def _finished(job: Job, config: Config, opened: _Datasets) -> RunHistory | None:
    directory = _directory(job, config)
    try:
        history = read_history(directory)
    except DataError:  # broken off before its first row, or damaged since
        return None
    if not history.final:
        return None
    wanted = _relevant(_flat_of(config))
    stored = _relevant({**_flat_of(Config()), **history.config})  # a setting younger than the run: by its default, all is as it was before
    different = [key for key in sorted({*wanted, *stored}) if key not in wanted or key not in stored or wanted[key] != stored[key]]
    if different:
        shown = ", ".join(f"{key} {_shown(stored, key)} instead of {_shown(wanted, key)}" for key in different[:4])
        raise ConfigError(f"{directory} holds a finished run with another configuration ({shown}); remove it, or use the sweep's first configuration")
    if other := other_data(history, _dataset(config, opened)):
        raise ConfigError(f"{directory} holds a finished run trained on {other}; remove it, or put the sweep's first data back")
    return history


def _relevant(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if not key.startswith(_IRRELEVANT)}


def _shown(settings: Mapping[str, object], key: str) -> str:
    return repr(settings[key]) if key in settings else "unset"


def _flat_of(config: Config) -> dict[str, object]:
    """Through YAML, as a stored configuration has gone."""
    return {key.replace("_", "-"): value for key, value in flatten(yaml.safe_load(config.to_yaml())).items()}
