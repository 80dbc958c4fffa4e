"""Weights & Biases as a mirror of ``metrics.jsonl``: it can fail in any way without a training noticing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckd_fed.config import Config
from ckd_fed.home import code_version

_TRIES = 3  # failures in a row after which W&B is given up
_INIT_SECONDS = 20.0


class WandbMirror:
    """One W&B run, written by the one process that also writes ``metrics.jsonl``.

    Rounds are a metric, ``round``, and every other metric is plotted over it (an offline run that is resumed starts W&B's own step
    anew). Only ``round`` and ``final`` rows are mirrored: they hold all that is plotted.

    Args:
        directory: of the run; W&B writes into ``wandb/`` below it.
        config: the resolved configuration.
        facts: further facts for the run's configuration (fingerprints, nodes).
        write: says once that W&B was given up.
    """

    def __init__(self, directory: Path, config: Config, facts: Mapping[str, Any], write: Callable[[str], None]) -> None:
        self._write = write
        self._failures = 0
        self._run: Any = None
        try:
            self._run = _init(directory, config, facts, write)
            write(f"W&B: {self._run.settings.mode} run {self._run.id} in {directory / 'wandb'}")
        except Exception as error:
            self._give_up(error)

    def log(self, row: Mapping[str, Any]) -> None:
        if self._run is None or row["event"] not in ("round", "final"):
            return
        try:
            self._run.log({key: value for key, value in row.items() if isinstance(value, (int, float))})
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures >= _TRIES:
                self._give_up(error)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=1 if "failed" in summary else 0)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        self._write(f"W&B: given up ({_line(error)}); the run goes on, metrics.jsonl is complete")


def _init(directory: Path, config: Config, facts: Mapping[str, Any], write: Callable[[str], None]) -> Any:
    """Start the W&B run; one that cannot be reached is written offline, to be synchronised later."""
    mode = config.tracking.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "") or ("online" if _has_key() else "offline")
    try:
        return _start(directory, config, facts, mode)
    except Exception as error:
        if mode != "online":
            raise
        write(f"W&B cannot be reached ({_line(error)}); the run is written offline, `wandb sync` sends it later")
        return _start(directory, config, facts, "offline")


def _start(directory: Path, config: Config, facts: Mapping[str, Any], mode: str) -> Any:
    import wandb

    chosen = config.tracking
    (directory / "wandb").mkdir(exist_ok=True)  # else W&B silently writes to the system's temporary folder
    settings = wandb.Settings(
        init_timeout=_INIT_SECONDS, console="off", silent=True, x_transaction_log_flush_interval=1.0, x_disable_stats=True, disable_git=True
    )
    try:
        run = wandb.init(
            project=chosen.project,
            name=directory.name,
            group=chosen.group or f"{config.dataset}-{config.backbone}",
            job_type="distillation" if config.distillation.enabled else "plain",
            tags=[tag.strip() for tag in chosen.tags.split(",") if tag.strip()] or None,
            dir=str(directory),
            mode=mode,  # type: ignore[arg-type]
            config={**config.flat(), **facts, "code": code_version()},
            settings=settings,
        )
    except BaseException:
        wandb.teardown()  # a failed init leaves its service half up
        raise
    run.define_metric("round")
    run.define_metric("*", step_metric="round")
    return run


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _has_key() -> bool:
    """Whether a key is at hand, looked up without asking the network or the user."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")


def wandb_mirror(config: Config, facts: Mapping[str, Any], write: Callable[[str], None]) -> list[Callable[[Path], WandbMirror]]:
    """The mirrors of a run: W&B unless it is off."""
    if config.tracking.wandb == "off":
        return []
    return [lambda directory: WandbMirror(directory, config, facts, write)]
