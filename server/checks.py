"""What the server demands of each kind of reply, and what it makes of it. Pure functions: a reply that fails changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckd_fed.config import Config
from ckd_fed.errors import ReplyError
from ckd_fed.evaluation.metrics import METRIC, metric_keys
from ckd_fed.evaluation.tested import UserTest
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.training.fit import validations_due
from ckd_fed.wire import NodeCard, Reply, margin_dtype, read_json

_WIDEST = 2**16
_SAME_MEAN = 1e-4  # float32 values against sums in float64
_GROUP = re.compile(r"\d+(?: to \d+)? (?:items|users)")


@dataclass(frozen=True)
class FitReport:
    """A teacher's round: its validations, the epoch it is at, the epoch of its best, whether it has converged."""

    rows: list[dict[str, float]]
    epoch: int
    best_epoch: int
    done: bool


def check_fit(reply: Reply, config: Config, before: int) -> FitReport:
    """A teacher's (or the plain student's) round from an epoch on.

    Early stopping is its own: where another node has trained it again, its values and its best are the same only to rounding.

    Raises:
        ReplyError: validations that were not due, or an outcome that is not theirs.
    """
    rows = reply.rows([f"val/{METRIC}", "epoch", "loss/total", "gain"])
    end = min(before + config.teacher_round, config.training.epochs)
    due = validations_due(config.training.validate_every, config.training.epochs, before, end)
    report = FitReport(rows, reply.integer("epoch", before), reply.integer("best-epoch", -1), reply.flag("done"))
    said, gains = [row["epoch"] for row in rows], [row["gain"] for row in rows]
    if not said or said != due[: len(said)] or report.epoch != said[-1]:
        raise ReplyError(f"{reply.stamp}: it is at epoch {report.epoch} and its validations are of epochs {said}; those due are {due}")
    if not report.done and report.epoch != min(end, config.training.epochs - 1):
        raise ReplyError(f"{reply.stamp}: it stopped at epoch {report.epoch} without having converged; {end} was asked for")
    if not set(gains) <= {0, 1}:
        raise ReplyError(f"{reply.stamp}: its gains are {gains}; each is 0 or 1")
    last = max((int(epoch) for epoch, gain in zip(said, gains, strict=True) if gain), default=0)
    if report.best_epoch != last if last else report.best_epoch > before:
        raise ReplyError(f"{reply.stamp}: the epoch of its best is {report.best_epoch}; its last gain is at epoch {last or 'none'} of this round")
    return report


@dataclass(frozen=True)
class TestReport:
    """Test metrics of a teacher or of the plain student, what was chosen on validation to read it out, the width of its tables, its users."""

    metrics: dict[str, float]
    readout: dict[str, float]
    width: int
    by_user: UserTest


def check_test(reply: Reply, config: Config, card: NodeCard) -> TestReport:
    """Test metrics of a teacher or of the plain student; the card is any that states the split's sizes."""
    width = reply.integer("width", 1)
    if width > _WIDEST:
        raise ReplyError(f"{reply.stamp}: its embedding tables are {width} wide; at most {_WIDEST} is believed")
    metrics, readout = split_readout(reply.numbers(metric_keys(config.ks)))
    return TestReport(metrics, readout, width, check_users(reply, config, reply.stamp.role, card.n_test_users, card.n_users, metrics))


def check_users(reply: Reply, config: Config, model: str, users: int, limit: int, means: Mapping[str, float]) -> UserTest:
    """A test by groups, and user by user where that was asked for.

    Args:
        reply: that holds it.
        config: of the run.
        model: the name that the groups must have.
        users: how many it must be of.
        limit: of their ids, the split's number of users.
        means: metric -> mean that the same reply states.

    Raises:
        ReplyError: groups that are none, another number of users or ids that are none, values that are no shares or not those of the means.
    """
    n = _users(reply, users)
    try:
        groups = [_group(row, model) for row in read_json(reply.text("groups"))]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ReplyError(f"{reply.stamp}: its groups of users and items cannot be read: {error}") from None
    if n and {group["kind"] for group in groups} != {"users", "items"}:
        raise ReplyError(f"{reply.stamp}: its {len(groups)} groups of {n} users' test are not of users and of items")
    if not config.evaluation.user_table:
        return UserTest(np.empty(0, dtype=np.int32), {}, groups)
    ids = reply.array("users", (n,), np.dtype("<i4"), limit - 1)
    if n and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        raise ReplyError(f"{reply.stamp}: its test users are not ascending ids from 0")
    values = {}
    for name in metric_keys(config.ks):
        column = values[name] = reply.array(f"user/{name}", (n,), np.dtype("<f4"), 1.0)
        if n and (column.min() < 0 or abs(float(column.mean(dtype=np.float64)) - means[name]) > _SAME_MEAN):
            raise ReplyError(f"{reply.stamp}: its users' {name} have the mean {column.mean():g}, but it states {means[name]:g}")
    return UserTest(ids, values, groups)


def _group(row: Mapping[str, Any], model: str) -> dict[str, Any]:
    n, share = int(row["n"]), float(row[METRIC])
    if row["model"] != model or row["kind"] not in ("users", "items") or not _GROUP.fullmatch(row["group"]):
        raise ValueError(f"{ascii(row)[:120]} is none of {model}")
    if n < 0 or not 0 <= share <= 1:
        raise ValueError(f"{ascii(row)[:120]} is no share of a number")
    return {"model": model, "kind": row["kind"], "group": row["group"], "n": n, METRIC: share}


def split_readout(numbers: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics, and what was chosen on validation to read a model out (``readout/...``)."""
    chosen = {name: value for name, value in numbers.items() if name.startswith("readout/")}
    return {name: value for name, value in numbers.items() if name not in chosen}, chosen


@dataclass(frozen=True)
class Sheets:
    """A teacher's margins of one stretch: a sheet and the hash of its triples for each worker."""

    sheets: list[np.ndarray]
    hashes: list[str]


def check_sheets(reply: Reply, config: Config, steps: Sequence[int]) -> Sheets:
    """A teacher's sheets, one for each worker.

    Args:
        reply: to ``score``.
        config: of the run.
        steps: of the stretch, for each worker.

    Raises:
        ReplyError: another shape or dtype, a margin that is not finite or beyond the bound, no hash for a worker.
    """
    columns = config.distillation.batch_size + config.training.batch_size
    dtype, bound = margin_dtype(config), config.distillation.margin_bound
    sheets = [reply.array(f"margins/{worker}", (n, columns), dtype, bound) for worker, n in enumerate(steps)]
    hashes = reply.values.get("hashes")
    if not isinstance(hashes, list) or len(hashes) != len(steps) or not all(isinstance(said, str) for said in hashes):
        raise ReplyError(f"{reply.stamp}: its hashes are {hashes!r}, one for each of {len(steps)} workers is needed")
    return Sheets(sheets, hashes)


def disagreement(sheets: Mapping[str, Sheets]) -> str:
    """Two teachers whose sheets are bound to different triples; empty if there are none."""
    first = next(iter(sheets))
    other = next((m for m, taken in sheets.items() if taken.hashes != sheets[first].hashes), None)
    return f"teachers {first} and {other} answered for different triples; their split, seed or code differs" if other else ""


@dataclass(frozen=True)
class WorkerReport:
    """A student worker's round.

    Attributes:
        weights: its parameters.
        best: a lone student's at its best validation of the round, where that was a gain and is not the last; else None.
        rows: a lone student's validations; of several workers each one's means.
        epoch: where it is now.
        samples: behind its means.
        fresh: its optimiser had to start anew.
        evaluation: its share of the validation of the parameters that it was sent, where that was asked for.
    """

    weights: dict[str, np.ndarray]
    best: dict[str, np.ndarray] | None
    rows: list[dict[str, float]]
    epoch: int
    samples: int
    fresh: bool
    evaluation: Sums | None = None


def check_worker(
    reply: Reply,
    config: Config,
    *,
    before: int,
    epochs: int,
    steps: int,
    required: Sequence[str],
    taught: Sequence[str],
    like: Mapping[str, np.ndarray] | None,
    stopping: EarlyStopping | None = None,
    whole: bool = True,
    evaluation: Callable[[Reply], Sums] | None = None,
) -> WorkerReport:
    """A student worker's round.

    Args:
        reply: to ``distil``.
        config: of the run.
        before: epoch that it started from.
        epochs: that were asked for.
        steps: its share of an epoch.
        required: metrics that must be there.
        taught: modalities with a teacher whose effects and weights must be there.
        like: parameters whose names and shapes it must have, where known.
        stopping: early stopping as it was before the round, of a lone student, which goes by it; None for several workers.
        whole: every item has every modality. Otherwise a modality's mean weight is over the samples that have it, and all that the
            weights say is that each lies where a weight can.
        evaluation: check of the validation that was asked for along with it; None for none.

    Raises:
        ReplyError: other epochs or another share, parameters or metrics that are not those of the student, validations that early stopping
            would not have come to, effects or weights out of range.
    """
    epoch, samples = reply.integer("epoch"), reply.integer("samples", 1)
    if stopping is None:
        rows = [{name: value for name, value in reply.numbers(required).items() if not name.startswith("sum/")}]
        end, gained = before + epochs, 0
    else:
        rows = reply.rows([*required, "epoch", "gain"])
        end, gained = _replayed(reply, config, rows, before, before + epochs, replace(stopping))
    if epoch != end:
        raise ReplyError(f"{reply.stamp}: it stopped at epoch {epoch}, {end} was asked for")
    if samples != (share := steps * (epoch - before) * config.training.batch_size):
        raise ReplyError(f"{reply.stamp}: it says that it trained on {samples} samples, its share is {share}")
    for row in rows:
        _check_effects(reply, row, taught, whole)
        for name in (name for name in row if name.startswith("asked/")):
            if not 0 <= row[name] <= 1 + 1e-9:
                raise ReplyError(f"{reply.stamp}: {name} is {row[name]!r}; the share of the samples that a mean is over lies between 0 and 1")
    weights = reply.weights(like)
    best = reply.weights(weights, "best/") if gained and gained != epoch else None
    evaluated = evaluation(reply) if evaluation else None
    return WorkerReport(weights, best, rows, epoch, samples, reply.flag("fresh-optimizer"), evaluated)


def _replayed(reply: Reply, config: Config, rows: Sequence[Mapping[str, float]], before: int, last: int, stopping: EarlyStopping) -> tuple[int, int]:
    """Where early stopping, which is taken on, ends the round of one that stops by itself, and the epoch of its last gain there (0 for none)."""
    chosen, gained = config.training, 0
    due = validations_due(chosen.validate_every, chosen.epochs, before, last)
    said = [row["epoch"] for row in rows]
    for epoch, row in zip(due, rows, strict=False):
        gain = stopping.update(row[f"val/{METRIC}"], epoch)
        if row["gain"] != gain:
            raise ReplyError(f"{reply.stamp}: its validation at epoch {epoch} has gain {row['gain']:g}, its {METRIC} says {gain:d}")
        gained = epoch if gain else gained
        if stopping.stop:
            due, last = due[: due.index(epoch) + 1], epoch
            break
    if said != due:
        raise ReplyError(f"{reply.stamp}: its validations are of epochs {said}, those due are {due}")
    return last, gained


def _check_effects(reply: Reply, row: Mapping[str, float], taught: Sequence[str], whole: bool) -> None:
    for m in taught:
        if not 0 < row[f"effect/{m}"] <= 10.0 + 1e-6:
            raise ReplyError(f"{reply.stamp}: the effect of {m} is {row[f'effect/{m}']!r}; a causal effect lies between 1e-8 and 10")
        if not 0 <= row[f"weight/{m}"] <= len(taught) + 1e-3:
            raise ReplyError(f"{reply.stamp}: the weight of {m} is {row[f'weight/{m}']!r}; a weight lies between 0 and {len(taught)}")
    total = sum(row[f"weight/{m}"] for m in taught)
    if whole and abs(total - len(taught)) > 1e-3 * max(1, len(taught)):
        raise ReplyError(f"{reply.stamp}: the weights do not sum to the number of modalities, {len(taught)}, but to {total:g}")


@dataclass(frozen=True)
class Sums:
    """Sums of metrics over a worker's share of the users, what was chosen on validation to read the student out, its users on test."""

    sums: dict[str, float]
    readout: dict[str, float]
    n_users: int
    by_user: UserTest | None = None


def check_evaluation(reply: Reply, config: Config, required: Sequence[str], card: NodeCard, share: tuple[int, int], *, test: bool = False) -> Sums:
    """A worker's share of an evaluation, beside other metrics or alone; each of its sums is at most its number of users.

    Args:
        reply: that holds it.
        config: of the run.
        required: metrics that must be there.
        card: one that states the split's sizes.
        share: (w, W): of the users.
        test: a test; else a validation, of ``training.validation-users`` at most.
    """
    validated = min(config.training.validation_users or card.n_val_users, card.n_val_users)
    n = _users(reply, len(range(share[0], card.n_test_users if test else validated, share[1])))
    numbers, readout = split_readout(reply.numbers([f"sum/{name}" for name in required]))
    sums = {name.removeprefix("sum/"): value for name, value in numbers.items() if name.startswith("sum/")}
    for name, value in sums.items():
        if not 0 <= value <= n * (1 + 1e-9):
            raise ReplyError(f"{reply.stamp}: {name} sums to {value!r} over {n} users, a share between 0 and 1 is needed for each")
    means = {name: value / max(1, n) for name, value in sums.items()}
    by_user = check_users(reply, config, "student", n, card.n_users, means) if test else None
    return Sums(sums, readout, n, by_user)


def _users(reply: Reply, users: int) -> int:
    """The number of users that a reply is of, which is known."""
    n = reply.integer("n-users")
    if n != users:
        raise ReplyError(f"{reply.stamp}: n-users is {n}, it was asked about {users}")
    return n
