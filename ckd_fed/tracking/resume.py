"""The configuration of a run that is gone on with: its own, and of what is given only what does not decide its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ckd_fed.config import Config, flatten, restore
from ckd_fed.errors import ConfigError, DataError

# What may be set anew when a run is gone on with; everything else decides its result.
FREE = ("resume", "home", "data.dir", "training.device", "training.threads", "training.cuda_graphs", "federation.", "tracking.")
FIXED = (  # the last two decide how fast workers learn and when they are averaged
    "federation.teacher_epochs",
    "federation.student_workers",
    "federation.rate_scale",
    "federation.stretch_mb",
)


def find_run(runs: Path, name: str) -> Path:
    """The directory of a run that is to be gone on with.

    Raises:
        ConfigError: there is no such run.
    """
    directory = runs / name
    if not (directory / "config.yaml").is_file():
        there = sorted(path.name for path in runs.iterdir() if (path / "config.yaml").is_file()) if runs.is_dir() else []
        raise ConfigError(f"resume: there is no run {name!r} in {runs} (runs there: {', '.join(there[-5:]) or 'none'})")
    return directory


def resumed_config(directory: Path, given: Mapping[str, Any]) -> Config:
    """A run's own configuration; what is given may repeat it, or change what does not decide the result.

    Args:
        directory: of the run.
        given: overrides, ``resume`` among them.

    Raises:
        ConfigError: a key would change the result.
        DataError: the run's configuration is damaged.
    """
    try:
        own = flatten(yaml.safe_load((directory / "config.yaml").read_text()))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"resume: {directory / 'config.yaml'} is damaged: {' '.join(str(error).split())}") from None
    wanted = {key: value for key, value in flatten(given).items() if value != ""}

    different = [key for key, value in wanted.items() if not _is_free(key) and own.get(key, "") != value]
    if different:
        key, *_ = different
        shown = key.replace("_", "-")
        # What the app's pyproject.toml sets comes here too, and nobody can leave that out.
        repeated = " ".join([f'resume="{directory.name}"', *(f"{one.replace('_', '-')}={json.dumps(own.get(one, ''))}" for one in different)])
        raise ConfigError(
            f"resume: {shown} is {wanted[key]!r} here, the run {directory.name!r} has {own.get(key, '')!r}; leave {shown} out, or start a new run "
            f"(if the app sets it, give what the run was started with: -c '{repeated}')"
        )
    return restore(own, {key: value for key, value in wanted.items() if _is_free(key)})


def _is_free(key: str) -> bool:
    return key not in FIXED and any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)
