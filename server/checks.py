"""What the server demands of each kind of reply, and what it makes of it. Pure functions: a reply that fails changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckd_fed.config import Config
from ckd_fed.errors import ReplyError
from ckd_fed.evaluation.metrics import metric_keys
from ckd_fed.training.trainer import METRIC
from ckd_fed.wire import Reply, margin_dtype

_WIDEST = 2**16


@dataclass(frozen=True)
class FitReport:
    """A teacher's round: its validations, the epoch it is at, the epoch of its best, whether it has converged."""

    rows: list[dict[str, float]]
    epoch: int
    best_epoch: int
    done: bool


def check_fit(reply: Reply, config: Config, before: int) -> FitReport:
    """A teacher's (or the plain student's) round from an epoch on.

    Raises:
        ReplyError: epochs that were not asked for, or rows that do not belong to them.
    """
    rows = reply.rows([f"val/{METRIC}", "epoch", "loss/total", "gain"])
    epoch, asked = reply.integer("epoch", before), config.teacher_round
    if not before < epoch <= min(before + asked, config.training.epochs):
        raise ReplyError(f"{reply.stamp}: it says that it is at epoch {epoch} after at most {asked} from {before}")
    report = FitReport(rows, epoch, reply.integer("best-epoch", -1), reply.flag("done"))
    said = [row["epoch"] for row in rows]
    if not rows or said[-1] != epoch or said != sorted(set(said)) or said[0] <= before:
        raise ReplyError(f"{reply.stamp}: its validations are of epochs {said}; ascending ones from {before + 1} to {epoch} are needed")
    if not report.done and epoch != min(before + asked, config.training.epochs):
        raise ReplyError(f"{reply.stamp}: it stopped at epoch {epoch} without having converged")
    if report.best_epoch > epoch:
        raise ReplyError(f"{reply.stamp}: the epoch of its best, {report.best_epoch}, is beyond its epoch {epoch}")
    return report


@dataclass(frozen=True)
class TestReport:
    """Test metrics of a teacher or of the plain student, what was chosen on validation to read it out, and the width of its tables."""

    metrics: dict[str, float]
    readout: dict[str, float]
    width: int


def check_test(reply: Reply, config: Config) -> TestReport:
    """Test metrics of a teacher or of the plain student."""
    width = reply.integer("width", 1)
    if width > _WIDEST:
        raise ReplyError(f"{reply.stamp}: its embedding tables are {width} wide; at most {_WIDEST} is believed")
    return TestReport(*split_readout(reply.numbers(metric_keys(config.ks))), width)


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
    """A student worker's round: its parameters, its means, the samples behind them, whether its optimiser had to start anew."""

    weights: dict[str, np.ndarray]
    metrics: dict[str, float]
    samples: int
    fresh: bool


def check_worker(
    reply: Reply, config: Config, *, epoch: int, steps: int, required: Sequence[str], taught: Sequence[str], like: Mapping[str, np.ndarray] | None
) -> WorkerReport:
    """A student worker's round.

    Args:
        reply: to ``distil``.
        config: of the run.
        epoch: where it must be now.
        steps: its share of the round.
        required: metrics that must be there.
        taught: modalities with a teacher whose effects and weights must be there.
        like: parameters whose names and shapes it must have, where known.

    Raises:
        ReplyError: another epoch or share, parameters or metrics that are not those of the student, effects or weights out of range.
    """
    if reply.integer("epoch") != epoch:
        raise ReplyError(f"{reply.stamp}: it stopped at epoch {reply.integer('epoch')}, {epoch} was asked for")
    samples = steps * config.training.batch_size
    if reply.integer("samples", 1) != samples:
        raise ReplyError(f"{reply.stamp}: it says that it trained on {reply.integer('samples')} samples, its share is {samples}")
    metrics = reply.numbers(required)
    for m in taught:
        if not 0 < metrics[f"effect/{m}"] <= 10.0 + 1e-6:
            raise ReplyError(f"{reply.stamp}: the effect of {m} is {metrics[f'effect/{m}']!r}; a causal effect lies between 1e-8 and 10")
    total = sum(metrics[f"weight/{m}"] for m in taught)
    if abs(total - len(taught)) > 1e-3 * max(1, len(taught)):
        raise ReplyError(f"{reply.stamp}: the weights do not sum to the number of modalities, {len(taught)}, but to {total:g}")
    return WorkerReport(reply.weights(like), metrics, samples, reply.flag("fresh-optimizer"))


@dataclass(frozen=True)
class Sums:
    """Sums of metrics over a worker's share of the users, and what was chosen on validation to read the student out."""

    sums: dict[str, float]
    readout: dict[str, float]
    n_users: int


def check_evaluation(reply: Reply, required: Sequence[str], users: int) -> Sums:
    """A worker's share of an evaluation; each of its sums is at most its number of users."""
    n = reply.integer("n-users")
    numbers, readout = split_readout(reply.numbers([f"sum/{name}" for name in required]))
    sums = {name.removeprefix("sum/"): value for name, value in numbers.items()}
    for name, value in sums.items():
        if not 0 <= value <= n * (1 + 1e-9):
            raise ReplyError(f"{reply.stamp}: {name} sums to {value!r} over {n} users, a share between 0 and 1 is needed for each")
    if n > users:
        raise ReplyError(f"{reply.stamp}: n-users is {n}, the split has {users} users")
    return Sums(sums, readout, n)
