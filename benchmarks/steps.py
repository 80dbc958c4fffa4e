"""What a training step of every backbone costs, and on what it spends its time.

    python benchmarks/steps.py --threads 1                        # data of TikTok's sizes are made up
    python benchmarks/steps.py --threads 1 --data DIR --dataset baby --backbones lattice freedom
    python benchmarks/steps.py --quick

Printed for each backbone: milliseconds of a plain and of a distillation step (sampling and the teachers' margins included, medians), of what
it does once an epoch (graphs, pruning, routing), the shares of a distillation step's processor time by kind of operation, and whether any
step sorts or searches for nearest items, which belongs into the once-an-epoch part.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from made_up import made_up

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.base import Backbone
from ckd_fed.config import resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.training.build import build_trainer
from ckd_fed.training.trainer import Trainer

TIKTOK = (9_308, 6_710, 59_541, {"image": 128, "audio": 128})
#: Kind of operation -> parts of the names of torch's operators, first match counts.
KINDS = {
    # A row of a constant matrix times a table is a weighted bag of its rows, and so is a row of the gradient of what was gathered.
    "sparse products and bags": ("sparse", "embedding_bag"),
    "dense products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addbmm", "aten::baddbmm"),
    "gathers": ("index", "embedding", "gather", "scatter"),
    "Adam": ("adam",),
}
SEARCHES = ("aten::sort", "aten::topk", "aten::argsort", "aten::unique", "aten::_unique2", "aten::coalesce")


class Runner:
    """One backbone in one role, ready to do steps."""

    def __init__(self, backbone: str, dataset: Dataset, *, distilled: bool, threads: int) -> None:
        config = resolve({"backbone": backbone, "training.threads": threads, "training.device": "cpu", "distillation.rho": 1.0}, {})
        self.trainer: Trainer = build_trainer(config, dataset, "student" if distilled else "plain", distilled=distilled)
        roles = dataset.modalities if distilled else ()
        self.tables = {m: build_trainer(config, dataset.of_modalities((m,)), f"teacher/{m}").joint_tables() for m in roles}

    def steps(self, n: int) -> None:
        """An epoch of n steps."""
        triples = [self.trainer.stream.step(0, step) for step in range(n)]
        sheets = {m: margin_sheet(table, triples, np.dtype(np.float16)) for m, table in self.tables.items()}
        self.trainer.train_epoch(0, sheets or None, triples)

    def per_step(self, n: int, rounds: int) -> tuple[float, float]:
        """Seconds of one step, and of what is done once an epoch (graphs may be built as late as in the first step): from epochs of n and 3 n."""
        self.steps(1)
        short, long = ([self._seconds(steps) for _ in range(rounds)] for steps in (n, 3 * n))
        step = (statistics.median(long) - statistics.median(short)) / (2 * n)
        once = max(0.0, statistics.median(short) - n * step)
        return step, 0.0 if type(self.trainer.backbone).start_epoch is Backbone.start_epoch else once  # else what differs is noise

    def _seconds(self, n: int) -> float:
        started = time.perf_counter()
        self.steps(n)
        return time.perf_counter() - started


def shares(runner: Runner, n: int) -> tuple[dict[str, float], list[str]]:
    """Kind -> share of the steps' processor time (the once-an-epoch part left out), and the searches that occur in them."""
    runner.trainer.backbone.start_epoch = lambda *_: None  # type: ignore[method-assign]
    with torch.profiler.profile() as profiler:
        runner.steps(n)
    found = dict.fromkeys([*KINDS, "the rest"], 0.0)
    operators = profiler.key_averages()
    for operator in operators:
        kind = next((kind for kind, parts in KINDS.items() if any(part in operator.key.lower() for part in parts)), "the rest")
        found[kind] += operator.self_cpu_time_total
    total = sum(found.values())
    return {kind: value / total for kind, value in found.items()}, sorted({o.key for o in operators if o.key in SEARCHES})


def line(backbone: str, dataset: Dataset, threads: int, n: int, rounds: int) -> str:
    """A backbone's row of the table."""
    plain, _ = Runner(backbone, dataset, distilled=False, threads=threads).per_step(n, rounds)
    runner = Runner(backbone, dataset, distilled=True, threads=threads)
    distilled, once = runner.per_step(n, rounds)
    kinds, searches = shares(runner, n)
    cells = [f"{1000 * plain:.1f}", f"{1000 * distilled:.1f}", f"{1000 * once:.0f}", *(f"{share:.0%}" for share in kinds.values())]
    return f"| {backbone} | {' | '.join(cells)} | {', '.join(searches) or 'none'} |"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the dataset's folder; without it, data of TikTok's sizes are made up")
    parser.add_argument("--dataset", default="tiktok")
    parser.add_argument("--backbones", nargs="+", default=sorted(BACKBONES), choices=sorted(BACKBONES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small data, two rounds of two steps: does it run?")
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.steps, arguments.rounds = 2, 2
    if arguments.data:
        dataset = open_dataset(resolve({"dataset": arguments.dataset, "data.dir": str((arguments.data / arguments.dataset).resolve())}, {}))
    else:
        dataset = made_up(*(800, 300, 5_000, {"image": 32, "audio": 16}) if arguments.quick else TIKTOK)
    print(f"{dataset.describe()}\n{arguments.threads} thread(s), torch {torch.__version__}\n")
    print(f"| backbone | plain, ms | distilled, ms | once an epoch, ms | {' | '.join([*KINDS, 'the rest'])} | searches in a step |")
    print("|" + "---|" * (5 + len(KINDS) + 1), flush=True)
    for backbone in arguments.backbones:
        print(line(backbone, dataset, arguments.threads, arguments.steps, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
