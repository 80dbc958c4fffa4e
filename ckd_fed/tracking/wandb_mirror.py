"""Weights & Biases as a mirror of ``metrics.jsonl``: it can fail in any way without a training noticing."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckd_fed.config import Config
from ckd_fed.files import write_atomically
from ckd_fed.home import code_version
from ckd_fed.tracking.record import read_rows

_TRIES = 3  # failures in a row after which W&B is given up
_INIT_SECONDS = 20.0
_FINISH_SECONDS = 60.0  # a server that hangs at the end costs twice this at most: once for tables and artifacts, once for the rows
_WIDEST_TAG = 64
_RUNS = "wandb/runs.json"  # of a run's directory


class WandbMirror:
    """One W&B run, written by the one process that also writes ``metrics.jsonl``.

    Rounds are a metric, ``round``, and every other metric is plotted over it. A run that is gone on with goes on in its W&B run where both
    are online: recorded rounds that it lacks are sent first, and those that are done again stand there twice, with the same numbers. Offline
    it is a W&B run of its own from there on, and ``ckd-fed wandb replay`` makes one of all. Only ``round`` and ``final`` rows are mirrored:
    they hold all that is plotted. Beside them there are two tables, ``tables/final`` (a row a model) and ``tables/groups`` (recall by groups
    of users and items), and, unless ``tracking.artifacts`` is off, two artifacts, the best student and the resolved configuration.

    Args:
        directory: of the run; W&B writes into ``wandb/`` below it.
        config: the resolved configuration.
        facts: further facts for the run's configuration (fingerprints, nodes).
        write: says once that W&B was given up.
    """

    def __init__(self, directory: Path, config: Config, facts: Mapping[str, Any], write: Callable[[str], None]) -> None:
        self._write = write
        self._directory = directory
        self._artifacts = config.tracking.artifacts
        self._failures = 0
        self._run: Any = None
        self._reason = ""
        self._ends: dict[str, Mapping[str, Any]] = {}
        try:
            self._run = _init(directory, config, facts, write)
            write(f"W&B: {self._run.settings.mode} run {self._run.id}{' goes on' if self._run.resumed else ''} in {directory / 'wandb'}")
            if self._run.resumed:
                self._send_lost()
            elif config.resume:
                write(f"W&B: that run holds the rounds from here on; `ckd-fed wandb replay {config.resume}` makes one run of all, at the end")
        except Exception as error:
            self._give_up(error)

    def _send_lost(self) -> None:
        """Log the recorded rounds after the last that W&B has: a process that was ended may have had some of them waiting."""
        last = self._run.summary.get("round") or 0
        recorded = self._directory / "metrics.jsonl"
        for row in read_rows(recorded) if recorded.is_file() else []:
            if row["event"] == "round" and row["round"] > last:
                self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror a row of ``metrics.jsonl``; never raises."""
        if row["event"] in ("groups", "final"):
            self._ends[row["event"]] = row
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
        """Add the summary and the artifacts and end the run; takes twice ``_FINISH_SECONDS`` at most, and never raises."""
        if self._run is None:
            return
        try:
            if self._run.resumed and "failed" not in summary and self._run.summary.get("failed"):
                del self._run.summary["failed"]  # why it ended before
            self._run.summary.update(dict(summary))
            _within(_FINISH_SECONDS, self._attach)
        except Exception as error:
            self._write(f"W&B: tables, best student and configuration could not all be attached ({_line(error)})")
        try:
            self._run.finish(exit_code=1 if "failed" in summary else 0)
        except Exception as error:
            self._give_up(error)

    def _attach(self) -> None:
        """Tables and artifacts. For both W&B asks its server at once, so they may fail, or hang, where rows are just queued."""
        tables = _tables(self._ends)
        if tables:
            self._run.log(tables)
        if not self._artifacts:
            return
        for kind, file in (("model", "checkpoints/best.safetensors"), ("configuration", "config.yaml")):
            if (self._directory / file).is_file():
                self._run.log_artifact(_artifact(self._run, f"{self._directory.name}-{kind}", kind, self._directory / file))

    @property
    def given_up(self) -> str:
        """Why nothing more is mirrored; empty while all is well."""
        return self._reason

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        self._reason = _line(error)
        self._write(f"W&B: given up ({self._reason}); the run goes on, metrics.jsonl is complete, `ckd-fed wandb replay` sends it later")


def _tables(ends: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tables of the rows that a run ends with."""
    import wandb

    tables: dict[str, Any] = {}
    if "final" in ends:
        header, data = final_rows(ends["final"])
        tables["tables/final"] = wandb.Table(columns=header, data=data)
    groups = ends.get("groups", {}).get("groups")
    if groups:
        columns: list[Any] = list(groups[0])
        tables["tables/groups"] = wandb.Table(columns=columns, data=[[group[column] for column in columns] for group in groups])
    return tables


def final_rows(row: Mapping[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """The final row as a table: a row for each model, a column for each metric, ``only/<m>/…`` columns empty where a model has no views."""
    tests: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        model, separator, metric = key.removeprefix("final/").partition("/test/")
        if separator and key.startswith("final/"):
            tests.setdefault(model, {})[metric] = value
    metrics = list(dict.fromkeys(metric for test in tests.values() for metric in test))
    return ["model", "best epoch", *metrics], [
        [model, row.get(f"final/{model}/best_epoch"), *(test.get(metric) for metric in metrics)] for model, test in tests.items()
    ]


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call something that may hang, in a thread that nobody waits for longer than this.

    Raises:
        TimeoutError: it has not returned; what the call itself raises is raised here.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if failures:
        raise failures[0]


def _artifact(run: Any, name: str, kind: str, file: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), type=kind, metadata={"run": run.id})
    artifact.add_file(str(file))
    return artifact


def _init(directory: Path, config: Config, facts: Mapping[str, Any], write: Callable[[str], None]) -> Any:
    """Start the W&B run; one that cannot be reached is written offline, to be synchronised later."""
    mode = config.tracking.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "") or ("online" if has_key() else "offline")
    earlier = _written(directory).get(config.tracking.project, "") if config.resume and mode == "online" else ""
    if earlier:
        try:
            return _start(directory, config, facts, mode, earlier)
        except Exception as error:
            write(f"W&B: its run {earlier} cannot be gone on with ({_line(error)})")
    try:
        return _start(directory, config, facts, mode)
    except Exception as error:
        if mode != "online":
            raise
        write(f"W&B cannot be reached ({_line(error)}); the run is written offline, `wandb sync` sends it later")
        return _start(directory, config, facts, "offline")


def _start(directory: Path, config: Config, facts: Mapping[str, Any], mode: str, earlier: str = "") -> Any:
    import wandb

    chosen = config.tracking
    (directory / "wandb").mkdir(exist_ok=True)  # else W&B silently writes to the system's temporary folder
    settings = wandb.Settings(
        init_timeout=_INIT_SECONDS,
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,
        console="off",
        silent=True,
        x_transaction_log_flush_interval=1.0,
        x_disable_stats=True,
        disable_git=True,
    )
    try:
        run = wandb.init(
            project=chosen.project,
            name=directory.name,
            group=chosen.group or f"{config.dataset}-{config.backbone}",
            job_type="distillation" if config.distillation.enabled else "plain",
            tags=_tags(config, facts),
            dir=str(directory),
            mode=mode,  # type: ignore[arg-type]
            id=earlier or None,
            resume="must" if earlier else None,
            config={**config.flat(), **facts, "code": code_version()},
            settings=settings,
        )
    except BaseException:
        wandb.teardown()  # a failed init leaves its service half up
        raise
    run.define_metric("round")
    run.define_metric("*", step_metric="round")
    if run.settings.mode == "online":
        with suppress(OSError):
            write_atomically(directory / _RUNS, json.dumps({**_written(directory), chosen.project: run.id}).encode())
    return run


def _written(directory: Path) -> dict[str, str]:
    """Project -> id of the online W&B run that holds this run."""
    try:
        found = json.loads((directory / _RUNS).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tags(config: Config, facts: Mapping[str, Any]) -> list[str]:
    """The user's tags, and what one filters by: dataset, backbone, recipe, and whether the data are a stand-in."""
    named = [*config.tracking.tags.split(","), config.dataset, config.backbone, config.recipe, "stand-in" if facts.get("standin") else ""]
    return list(dict.fromkeys(tag.strip()[:_WIDEST_TAG] for tag in named if tag.strip()))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def has_key() -> bool:
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
