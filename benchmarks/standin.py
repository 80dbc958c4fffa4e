"""Does the stand-in carry the imbalance planted in it, and does distillation mend it?

Trains both teachers, a plain and a distilled student for each seed, with the same hyper-parameters and early stopping, and prints test
metrics, mean weights and seconds. The standard NDCG is meant.

Usage, from the root of a checkout::

    python benchmarks/standin.py                         # three seeds, VBPR, in a temporary folder
    python benchmarks/standin.py --seeds 123 --rho 0.01 --backbone mmgcn
    python benchmarks/standin.py --dir data/standin      # generate there, or use what is there

Exit status 1 if, averaged over the seeds, the weight of image (planted weak) is not above 1 and that of text not below, over the
whole training and at its best epoch, or the distilled student's Recall@20 is not above the plain one's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset, load_dataset
from ckd_fed.data.standin import DEFAULT_SEED, generate_standin
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.training.build import build_fit, build_trainer
from ckd_fed.training.fit import Fit, Sheets
from ckd_fed.training.means import Values

STRONG, WEAK = "text", "image"
RECALL, NDCG = "recall@20", "ndcg@20"
LEARNING_RATE, RHO, EPOCHS = 1e-3, 0.1, 240  # settings of the stand-in; a plain student alone does best at 5e-4, so compare with that too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[123, 2024, 7], help="of the runs")
    parser.add_argument("--backbone", default="vbpr")
    parser.add_argument("--rho", type=float, default=RHO)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most, of every role")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dir", type=Path, help="folder of the stand-in; by default a temporary one")
    parser.add_argument("--data-seed", type=int, default=DEFAULT_SEED, help="of the stand-in itself")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = generate_standin((args.dir or Path(temporary) / "standin").absolute(), args.data_seed)
        dataset = load_dataset(directory, name="stand-in", standin=True)
        print(dataset.describe(), flush=True)
        rows: list[Values] = []
        for seed in args.seeds:
            config = resolve(
                {
                    "backbone": args.backbone,
                    "seed": seed,
                    "training": {"learning_rate": args.learning_rate, "epochs": args.epochs, "threads": args.threads, "device": "cpu"},
                    "distillation": {"rho": args.rho},
                }
            )
            row = run(config, dataset)
            if not rows:
                print(line(f"{args.backbone}", row.keys()), flush=True)
            rows.append(row)
            print(line(f"seed {seed}", (f"{value:.4f}" for value in row.values())), flush=True)
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    print(line("mean", (f"{value:.4f}" for value in mean.values())))
    return verdict(mean)


def run(config: Config, dataset: Dataset) -> Values:
    """One seed's row of the table: test metrics, mean weights over the training and at its best epoch, seconds."""
    row: Values = {}
    fits = {m: train(config, dataset.of_modalities([m]), f"teacher/{m}", m, row) for m in (WEAK, STRONG)}
    train(config, dataset, "plain", "plain", row)
    teachers = {m: fit.trainer.joint_tables() for m, fit in fits.items()}

    def sheets(steps: Sequence[StepTriples]) -> Sheets:
        return {m: margin_sheet(teacher, steps, DTYPES[config.distillation.margin_dtype]) for m, teacher in teachers.items()}

    train(config, dataset, "student", "distilled", row, sheets)
    return row


def train(
    config: Config, dataset: Dataset, role: str, column: str, row: Values, sheets: Callable[[Sequence[StepTriples]], Sheets] | None = None
) -> Fit:
    """Train a role to early stopping, restore its best parameters and add its columns to the row."""
    started = time.monotonic()
    fit = build_fit(config, build_trainer(config, dataset, role, distilled=sheets is not None))
    reports = fit.advance(sheets=sheets)
    fit.trainer.restore(fit.best)
    test = fit.trainer.diagnose(dataset.test).compute()
    row[f"{column} R@20"], row[f"{column} N@20"] = test[RECALL], test[NDCG]
    if sheets is not None:
        best = next(report for report in reports if report["epoch"] == fit.stopping.best_epoch)
        for m in (WEAK, STRONG):
            row[f"w {m}"] = float(np.mean([report[f"weight/{m}"] for report in reports]))
            row[f"w {m} best"] = best[f"weight/{m}"]
    row[f"{column} s"] = time.monotonic() - started
    return fit


def line(label: str, cells: Iterable[str]) -> str:
    """One line of the table, in columns of equal width."""
    return f"{label:<10}" + "".join(f"{cell:>16}" for cell in cells)


def verdict(mean: Values) -> int:
    """Print what fails of what the stand-in promises; 1 if anything does."""
    promises = {
        f"the mean weight of {WEAK} is above 1 over the training": mean[f"w {WEAK}"] > 1 > mean[f"w {STRONG}"],
        f"the mean weight of {WEAK} is above 1 at the best epoch": mean[f"w {WEAK} best"] > 1 > mean[f"w {STRONG} best"],
        "the distilled student's Recall@20 is above the plain one's": mean["distilled R@20"] > mean["plain R@20"],
    }
    for promise, kept in promises.items():
        print(f"{'ok' if kept else 'FAILED'}: {promise}")
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
