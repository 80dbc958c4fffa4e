"""A distilled VBPR student trained in the manner of the published code and by this package, side by side in one run.

    python benchmarks/published_manner.py --data DIR --dataset tiktok --rho 1 --epochs 40 --threads 1

The published manner is that of ``naive.py``. Both start from the same parameters and learn from the same teachers; what differs is how
the work is done and which random triples are drawn. Printed: validation and test
Recall@20 of both every few epochs, milliseconds per step of both, and their ratio. So it answers two questions: does the fast
formulation learn the same, and how much faster is it?
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import naive
import numpy as np
import torch

from ckd_fed.backbones.vbpr import VBPR
from ckd_fed.config import resolve
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.training.build import build_fit, build_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the dataset's folder")
    parser.add_argument("--dataset", default="tiktok")
    parser.add_argument("--rho", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--epochs", type=int, default=40, help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=1000, help="of the teachers, at most (early stopping)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    overrides = {"dataset": arguments.dataset, "seed": arguments.seed, "data.dir": str((arguments.data / arguments.dataset).resolve())}
    config = resolve(overrides, {"distillation.rho": arguments.rho, "training.threads": arguments.threads, "training.device": "cpu"})
    dataset = open_dataset(config)
    teachers = {}
    for m in dataset.modalities:
        fit = build_fit(
            resolve(config.flat(), {"training.epochs": arguments.teacher_epochs}), build_trainer(config, dataset.of_modalities((m,)), f"teacher/{m}")
        )
        fit.advance()
        fit.trainer.restore(fit.best)
        teachers[m] = fit.trainer.joint_tables()
        print(f"teacher {m}: best epoch {fit.stopping.best_epoch}, validation Recall@20 {fit.stopping.best:.4f}", flush=True)

    ours, published = (build_trainer(config, dataset, "student", distilled=True) for _ in range(2))
    model, sampler = published.backbone, naive.Sampler(dataset, config)
    assert isinstance(model, VBPR)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.training.learning_rate)
    seconds = {"published": 0.0, "ours": 0.0}
    steps, dtype = ours.stream.steps_per_epoch, DTYPES[config.distillation.margin_dtype]

    def sheets(triples: Sequence[StepTriples]) -> dict[str, np.ndarray]:
        return {m: margin_sheet(embeddings, triples, dtype) for m, embeddings in teachers.items()}

    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        for _ in range(steps):
            loss = naive.distillation_loss(model, teachers, sampler.ranking(), sampler.pairs(), config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds["published"] += time.perf_counter() - started
        started = time.perf_counter()
        triples = ours.stream.epoch(epoch)
        ours.train_epoch(epoch, sheets(triples), triples)
        seconds["ours"] += time.perf_counter() - started
        if (epoch + 1) % config.training.validate_every == 0:
            shown = [
                f"{name}: val {trainer.rank(dataset.val).compute()['recall@20']:.4f} test {trainer.rank(dataset.test).compute()['recall@20']:.4f}"
                for name, trainer in (("published manner", published), ("ours", ours))
            ]
            print(f"epoch {epoch + 1:>3}  Recall@20  {'   '.join(shown)}", flush=True)
    per_step = {name: 1000 * total / (steps * arguments.epochs) for name, total in seconds.items()}
    print(f"step, sampling and teachers' margins included: published manner {per_step['published']:.1f} ms, ours {per_step['ours']:.1f} ms, ", end="")
    print(f"ratio {per_step['published'] / per_step['ours']:.1f} ({arguments.threads} CPU thread(s), torch {torch.__version__})")


if __name__ == "__main__":
    main()
