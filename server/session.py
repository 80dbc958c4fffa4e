"""A run from its configuration to its final row: a new one, or one that is gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ckd_fed.config import Config, resolve
from ckd_fed.data.locate import standin_notice
from ckd_fed.errors import ConfigError, DataError, EnrolmentError, FinalError, ReplyError
from ckd_fed.home import code_version, home
from ckd_fed.report.write import report_quietly
from ckd_fed.tracking.console import no_counterfactual_notice
from ckd_fed.tracking.record import Record, run_name, sole_writer
from ckd_fed.tracking.result import RunResult
from ckd_fed.tracking.resume import find_run, resumed_config
from ckd_fed.tracking.wandb_mirror import wandb_mirror
from ckd_fed.training.early_stopping import EarlyStopping
from server.checkpoints import FINISHED, RunState, load_state
from server.enrolment import Plan, different_features, enrol, full_name
from server.exchange import Exchange
from server.federation import Federation
from server.roster import Roster
from server.traffic import traffic_lines

# What Flower does when the SuperLink refuses the ServerApp's token: it sends itself SIGINT and exits with status 0.
_ENDED = (
    "Flower ended the ServerApp: by `flwr stop`, a signal, or because the SuperLink had no sign of life of it for a minute, as happens on a "
    "machine that is overloaded or was suspended"
)
_FORGET_SECONDS = 30.0  # a message takes 6 to 16 s in a deployment


@dataclass
class Session:
    """A run that came to its end."""

    result: RunResult
    federation: Federation


def run_federation(grid: Grid, given: Mapping[str, Any], flower_run_id: int, write: Callable[[str], None]) -> Session:
    """Run a federation from its run configuration, or go on with the run that ``resume`` names.

    Args:
        grid: Flower's view of the nodes.
        given: the run configuration.
        flower_run_id: Flower's number of this run.
        write: prints one line.

    Raises:
        CkdError: whatever goes wrong; the message of a run that can be gone on with says how.
    """
    asked = resolve(given)
    config, state = resumed(asked, given) if asked.resume else (asked, None)
    suffix = f"{flower_run_id % 10**6:06d}"
    name = asked.resume or run_name(config, suffix=suffix)
    directory = home(asked) / "runs" / name
    # The nodes keep their workspace by run, so a name that is used again must not find what an earlier run of that name left.
    run = state.run if state else f"{name}-{suffix}" if config.name else name
    with sole_writer(directory):
        write(f"ckd_fed {code_version()}: run {name}, waiting for nodes (up to {config.federation.enrol_timeout:.0f} s)")
        exchange = Exchange(grid, run, config)
        plan = enrol(exchange, write, state)
        if plan.card.standin and not state:
            config = resolve(given, standin=True)
            exchange = Exchange(grid, run, config)
        if state is None:
            stopping = EarlyStopping(config.training.patience)
            state = RunState(run, code_version(), plan.card.split, plan.features(), plan.modalities, len(plan.students), stopping)
        else:
            _same(state, plan)
        return _run(exchange, plan, directory, state, flower_run_id, write)


def _run(exchange: Exchange, plan: Plan, directory: Path, state: RunState, flower_run_id: int, write: Callable[[str], None]) -> Session:
    config = exchange.config
    facts = {
        "split": plan.card.split,
        "standin": plan.card.standin,
        "modalities": list(plan.modalities),
        "student_workers": len(plan.students),
        "features": json.loads(plan.card.features),
        "flower_run_id": str(flower_run_id),
        "code": code_version(),
        "nodes": plan.facts(),
    }
    resume_at = state.recorded if state.recorded else None
    record = Record(directory, config, wandb_mirror(config, facts, write), write, resume_at=resume_at)
    try:
        if resume_at is None:
            record.start(plan.card.dataset, **facts)
        else:
            record.row("resume", round=state.number, **facts)
            write(f"{plan.card.dataset}; going on after round {state.number} (epoch {state.epoch} of the student), run directory: {directory}")
        if plan.card.standin:
            write(standin_notice(config))
        for line in plan.describe():
            write(line)
        if not plan.card.counterfactual:
            write(no_counterfactual_notice(config.backbone))
        for modality in different_features(plan):
            write(f"NOTE: teacher {modality} holds other {modality} features than the student")
        for modality, reason in state.dropped.items():
            write(f"!! teacher {modality} was DROPPED earlier in this run: {reason}")
        federation = Federation(exchange, plan, record, state)
        result = federation.run()
        for line in traffic_lines(state, plan, config):
            write(line)
        record.finish(result, federation.rounds.elapsed)
    except BaseException as error:
        reason = _ENDED if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        record.fail(reason)
        go_on = f"to go on from the last finished round: -c 'resume=\"{directory.name}\"'"
        if isinstance(error, (SystemExit, OSError)):  # the latter above all of a full disk
            write(f"{reason}; {go_on}")
        if isinstance(error, ReplyError) and not isinstance(error, FinalError):
            raise type(error)(f"{error}; {go_on}") from None
        raise
    finally:
        if config.tracking.report:
            report_quietly(record.directory, write)
    federation.finish()
    _forget(exchange, federation.rounds.roster, write)
    return Session(result, federation)


def _forget(exchange: Exchange, roster: Roster, write: Callable[[str], None]) -> None:
    """Have the nodes delete their workspaces of a run that is finished. Whether they do changes nothing for it."""
    try:
        kept = exchange.tell("forget", sorted(roster.cards), _FORGET_SECONDS)
    except Exception as error:  # above all a SuperLink that has gone
        kept = dict.fromkeys(roster.cards, f"{type(error).__name__}: {error}")
    for node, reason in kept.items():
        write(f"NOTE: {full_name(node, roster.cards[node])} may keep its workspace/{exchange.run}, which can be deleted there ({reason})")


def resumed(asked: Config, given: Mapping[str, Any]) -> tuple[Config, RunState]:
    """The configuration and the state of the run that ``resume`` names.

    The run's own configuration counts; what is given may repeat it, or change what does not decide the result.

    Raises:
        ConfigError: no such run, one that is finished, or a key that would change its result.
        DataError: its checkpoint is damaged.
    """
    directory = find_run(home(asked) / "runs", asked.resume)
    try:
        state = load_state(directory)
    except DataError as error:
        raise DataError(f"resume: {error}; a run leaves its first checkpoint once its nodes are enrolled, start it afresh") from None
    if state.phase == FINISHED:
        raise ConfigError(f"resume: run {asked.resume!r} is finished; its results are in {directory}")
    return resumed_config(directory, given), state


def _same(state: RunState, plan: Plan) -> None:
    """The nodes there are those that the run began with, as far as its result depends on them."""
    found = {
        "split": (state.split[:12], plan.card.split[:12]),
        "modalities of the student": (",".join(state.modalities), ",".join(plan.modalities)),
        "number of student workers": (str(state.workers), str(len(plan.students))),
        "code": (state.code, code_version()),
        **{f"features of {role}": (state.features.get(role, now), now) for role, now in plan.features().items()},
    }
    for what, (before, now) in found.items():
        if before != now:
            raise EnrolmentError(f"resume: the run began with another {what}, {before} instead of {now}; go on with the same, or start a new run")
