"""Quality on real data: teachers, plain and distilled students, against what the published implementation gave.

    python benchmarks/quality.py --data DIR --dataset tiktok --seeds 123 2024 7 --rhos 0.01 0.1 1 10

trains each model to early stopping with the published hyper-parameters and appends one line to ``--results`` (JSON lines) for each.
Models that are in that file already are not trained again, so an interrupted call goes on where it stopped, and a table is printed
at the end from all that is there. DIR holds the dataset's folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.checkpoint import load_checkpoint, save_checkpoint
from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.training.build import build_fit, build_trainer
from ckd_fed.training.central import select

# Test Recall@20 of the authors' implementation on these files, by seed (as far as it was run).
PUBLISHED: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("tiktok", "vbpr"): {
        "plain": (0.0507, 0.0489, 0.0506),
        "teacher/image": (0.0413, 0.0468),
        "teacher/audio": (0.0352, 0.0380, 0.0357),
        "distilled rho=0.01": (0.0496, 0.0499),
        "distilled rho=0.1": (0.0511, 0.0501),
        "distilled rho=1": (0.0537, 0.0530),
        "distilled rho=10": (0.0543, 0.0545),
    },
    ("baby", "vbpr"): {
        "plain": (0.0514,),
        "teacher/text": (0.0507,),
        "teacher/image": (0.0345,),
        "distilled rho=0.01": (0.0568,),
        "distilled rho=0.1": (0.0628,),
        "distilled rho=1": (0.0639,),
    },
}


class Results:
    """The file of results: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def find(self, key: Mapping[str, object]) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def train(config: Config, dataset: Dataset, results: Results, model: str, teachers: Mapping[str, Embeddings]) -> Embeddings | None:
    """Train one model unless it is there already; returns a teacher's embeddings."""
    key = {"dataset": config.dataset, "backbone": config.backbone, "seed": config.seed, "model": model}
    kept = results.path.with_suffix("") / f"{config.dataset}-{config.backbone}-{config.seed}-{model.replace('/', '-')}.safetensors"
    if results.find(key) and (kept.is_file() or not model.startswith("teacher/")):
        if not model.startswith("teacher/"):
            return None
        arrays, _ = load_checkpoint(kept)
        return Embeddings(torch.from_numpy(arrays["users"]), torch.from_numpy(arrays["items"]))
    started = time.monotonic()
    role = model if model.startswith("teacher/") or model == "plain" else "student"
    own = select(dataset, (model.removeprefix("teacher/"),)) if model.startswith("teacher/") else dataset
    fit = build_fit(config, build_trainer(config, own, role, distilled=bool(teachers)))
    dtype = DTYPES[config.distillation.margin_dtype]

    def sheets(steps: Sequence[StepTriples]) -> dict[str, np.ndarray]:
        return {m: margin_sheet(embeddings, steps, dtype) for m, embeddings in teachers.items()}

    rows = fit.advance(sheets=sheets if teachers else None)
    at_best = next(row for row in rows if row["epoch"] == fit.stopping.best_epoch)
    fit.trainer.restore(fit.best)
    test = fit.trainer.diagnose(dataset.test).compute()
    weights = {name: value for name, value in at_best.items() if name.startswith(("weight/", "effect/"))}
    results.add(
        {**key, "best_epoch": fit.stopping.best_epoch, "val": fit.stopping.best, "seconds": time.monotonic() - started, "test": test, **weights}
    )
    print(f"{config.dataset} {config.backbone} seed {config.seed} {model}: best epoch {fit.stopping.best_epoch}", end="", flush=True)
    print(f", test Recall@20 {test['recall@20']:.4f}", flush=True)
    if not model.startswith("teacher/"):
        return None
    embeddings = fit.trainer.soft_scores()
    save_checkpoint(kept, {"users": embeddings.users.numpy(), "items": embeddings.items.numpy()}, {})
    return embeddings


def table(results: Results, dataset: str, backbone: str) -> None:
    """Print means over seeds beside the published ones."""
    rows = [row for row in results.rows if row["dataset"] == dataset and row["backbone"] == backbone]
    published: dict[str, tuple[float, ...]] = PUBLISHED.get((dataset, backbone), {})
    print(f"\n{dataset}, {backbone}: test Recall@20\n")
    print("| model | by seed | mean | published mean | ratio | best epoch | mean val R@20 | only-m views |\n|---|---|---|---|---|---|---|---|")
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        chosen = [row for row in rows if row["model"] == model]
        recalls = [row["test"]["recall@20"] for row in chosen]
        mean, theirs = float(np.mean(recalls)), float(np.mean(published[model])) if model in published else None
        views = sorted({name for row in chosen for name in row["test"] if name.startswith("only/") and name.endswith("/recall@20")})
        only = ", ".join(f"{name.split('/')[1]} {np.mean([row['test'][name] for row in chosen]):.4f}" for name in views)
        epochs = " to ".join(str(epoch) for epoch in sorted({min(row["best_epoch"] for row in chosen), max(row["best_epoch"] for row in chosen)}))
        by_seed = ", ".join(f"{row['seed']}: {row['test']['recall@20']:.4f}" for row in chosen)
        against = f"{theirs:.4f} | {mean / theirs:.3f}" if theirs else "not run | "
        print(f"| {model} | {by_seed} | {mean:.4f} | {against} | {epochs} | {np.mean([row['val'] for row in chosen]):.4f} | {only} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the dataset's folder")
    parser.add_argument("--dataset", default="tiktok")
    parser.add_argument("--backbone", default="vbpr")
    parser.add_argument("--seeds", type=int, nargs="+", default=[123, 2024, 7])
    parser.add_argument("--rhos", type=float, nargs="*", default=[0.01, 0.1, 1.0, 10.0])
    parser.add_argument("--no-plain", action="store_true", help="leave the plain student out")
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's default")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    base = {"dataset": arguments.dataset, "backbone": arguments.backbone, "data.dir": str((arguments.data / arguments.dataset).resolve())}
    for seed in arguments.seeds:
        config = resolve(base, {"seed": seed, "training.threads": arguments.threads})
        dataset = open_dataset(config)
        teachers = {}
        for m in dataset.modalities:
            embeddings = train(config, dataset, results, f"teacher/{m}", {})
            assert embeddings is not None
            teachers[m] = embeddings
        for rho in arguments.rhos:
            train(resolve(config.flat(), {"distillation.rho": float(rho)}), dataset, results, f"distilled rho={rho:g}", teachers)
        if not arguments.no_plain:
            train(config, dataset, results, "plain", {})
    table(results, arguments.dataset, arguments.backbone)


if __name__ == "__main__":
    main()
