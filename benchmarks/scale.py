"""Memory and time as users, items and interactions grow, each size in a process of its own.

    python benchmarks/scale.py --backbones vbpr freedom --threads 2
    python benchmarks/scale.py --quick

Measured on made-up data: building, what an epoch does once (drawing or learning its graph, bringing all rows up to date), a distillation step
(the margins of a teacher a modality included), of the first hundred and of the rest, in which large tables are moved row by row; triples a
second, an evaluation (on a sample of users, scaled to all of them), the peak of resident memory; computed: what the parameters with Adam's
state and gradients take (of tables moved row by row there are no gradients after the first hundred steps), and what a stretch of margins takes
on the wire. A size whose child dies of memory stands as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from made_up import made_up
from memory import peak_mb

from ckd_fed.backbones.base import Embeddings
from ckd_fed.config import resolve
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.evaluation.ranking import evaluate
from ckd_fed.training import batches
from ckd_fed.training.build import build_trainer

SIZES = ((20_000, 7_000, 120_000), (100_000, 50_000, 1_000_000), (500_000, 150_000, 5_000_000), (2_000_000, 500_000, 20_000_000))
QUICK = ((2_000, 700, 12_000), (4_000, 1_400, 24_000))
WIDTHS = {"image": 128, "text": 64}
COLUMNS = {
    "build, s": "{build_s:.1f}",
    "once an epoch, s": "{once_s:.2f}",
    "step, ms, after step 100 (steps 1 to 100)": "{step_ms:.0f} ({first_ms:.0f})",
    "epoch, min": "{epoch_min:.1f}",
    "million triples/s": "{million_triples_per_s:.1f}",
    "evaluation, min": "{evaluation_min:.1f}",
    "parameters, gradients and Adam, MB": "{state_mb:.0f}",
    "margins of 5 epochs and one modality, MB": "{stretch_mb:.0f}",
    "peak memory, MB (after the data)": "{peak_mb:.0f} ({data_mb:.0f})",
}
SAMPLE = 2_000  # users of an evaluation
MB = 1 << 20


class Clocked(list[StepTriples]):
    """Triples of some steps that note when each is asked for, and when all have been done with."""

    def __init__(self, triples: Iterable[StepTriples]) -> None:
        super().__init__(triples)
        self.clock: list[float] = []

    def __iter__(self) -> Iterator[StepTriples]:
        for triples in super().__iter__():
            self.clock.append(time.perf_counter())
            yield triples
        self.clock.append(time.perf_counter())


def child(backbone: str, n_users: int, n_items: int, n_train: int, threads: int, steps: int) -> dict[str, float]:
    batches.AHEAD = 1  # or a step's triples would be asked for long before the step
    dataset = made_up(n_users, n_items, n_train, WIDTHS)
    after_data = peak_mb()
    config = resolve({"backbone": backbone, "training.threads": threads, "training.device": "cpu", "distillation.rho": 1.0}, {})
    started = time.perf_counter()
    trainer = build_trainer(config, dataset, "student", distilled=True)
    built = time.perf_counter() - started
    generator = torch.Generator().manual_seed(0)
    teacher = Embeddings(*(torch.randn(n, 64, generator=generator) for n in (n_users, n_items)))

    def once_and_a_step() -> tuple[float, float]:
        triples = Clocked(trainer.stream.step(0, number) for number in range(1 + steps))
        started = time.perf_counter()
        sheets = {m: margin_sheet(teacher, triples, np.dtype(np.float16)) for m in dataset.modalities}
        margins = (time.perf_counter() - started) / len(triples)
        triples.clock.clear()
        started = time.perf_counter()
        trainer.train_epoch(0, sheets, triples)
        whole, each = time.perf_counter() - started, np.diff(triples.clock)
        return whole - float(each.sum()), float(np.median(each[1:])) + margins

    _, first = once_and_a_step()
    for state in trainer.optimizer._state.values():  # as if so many steps had been taken; by its public way the peak would rise
        state["step"].fill_(1000)
    once, seconds = once_and_a_step()
    started = time.perf_counter()
    drawn = [trainer.stream.step(0, number) for number in range(20)]
    margins = drawn[0].ranking.shape[1] + drawn[0].distillation.shape[1]
    rate = len(drawn) * margins / (time.perf_counter() - started)
    n_test = len(dataset.test.users)
    share = max(1, n_test // SAMPLE)
    started = time.perf_counter()
    tables = trainer.embeddings([trainer.backbone.joint])[trainer.backbone.joint]  # once, however many users are ranked for
    made = time.perf_counter()
    evaluate(tables, dataset.train, dataset.test, trainer.ks, share=(0, share))
    evaluated = made - started + (time.perf_counter() - made) * share
    parameters = sum(parameter.numel() for parameter in trainer.backbone.parameters())
    return {
        "data_mb": after_data,
        "build_s": built,
        "once_s": once,
        "step_ms": 1000 * seconds,
        "first_ms": 1000 * first,
        "epoch_min": (once + seconds * trainer.stream.steps_per_epoch) / 60,
        "million_triples_per_s": rate / 1e6,
        "evaluation_min": evaluated / 60,
        "state_mb": 4 * 4 * parameters / MB,
        "stretch_mb": config.training.validate_every * trainer.stream.steps_per_epoch * margins * 2 / MB,
        "peak_mb": peak_mb(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vbpr", "freedom"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes, smallest first")
    parser.add_argument("--quick", action="store_true", help="two small sizes: does it run?")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        backbone, *size = arguments.child
        print(json.dumps(child(backbone, *map(int, size), arguments.threads, arguments.steps)))  # type: ignore[call-arg]
        return
    print(f"features {', '.join(f'{m} {width}-d' for m, width in WIDTHS.items())}; {arguments.threads} CPU thread(s), torch {torch.__version__}\n")
    print(f"| backbone | users | items | training interactions | {' | '.join(COLUMNS)} |")
    print("|---" * (4 + len(COLUMNS)) + "|", flush=True)
    for backbone in arguments.backbones:
        for size in QUICK if arguments.quick else SIZES[: arguments.sizes]:
            options = ["--threads", str(arguments.threads), "--steps", str(arguments.steps)]
            done = subprocess.run([sys.executable, __file__, "--child", backbone, *map(str, size), *options], capture_output=True, text=True)
            shown = f"| {backbone} | " + " | ".join(f"{n:,}" for n in size)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
                print(f"{shown} | failed: {reason} |" + " |" * (len(COLUMNS) - 1), flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{shown} | {' | '.join(form.format(**row) for form in COLUMNS.values())} |", flush=True)


if __name__ == "__main__":
    main()
