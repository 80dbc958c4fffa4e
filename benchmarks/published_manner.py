"""A distilled VBPR student trained in the manner of the published code and by this package, side by side in one run.

    python benchmarks/published_manner.py --data DIR --dataset tiktok --rho 1 --epochs 40 --threads 1

The published manner, written anew here from the formulas: triples drawn user by user in Python, three passes over the whole catalogue
for the three views, absent features tiled to full matrices, one product per view, plain Adam. Both start from the same parameters and
learn from the same teachers; what differs is how the work is done and which random triples are drawn. Printed: validation and test
Recall@20 of both every few epochs, milliseconds per step of both, and their ratio. So it answers two questions: does the fast
formulation learn the same, and how much faster is it?
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.vbpr import VBPR
from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.training.build import build_fit, build_trainer
from ckd_fed.training.central import select

Batch = tuple[Tensor, Tensor, Tensor]


def tables(model: VBPR, present: Sequence[str]) -> Embeddings:
    """One view by a full pass: features of absent modalities tiled to every item, preferences to every user."""
    users: list[Tensor] = [model.user_embedding]
    items: list[Tensor] = [model.item_embedding]
    for m in model.modalities:
        features, preference = model.features(m), model.preference[m]
        if m not in present:
            features = features.mean(dim=0).tile(model.n_items, 1)
            preference = preference.mean(dim=0).tile(model.n_users, 1)
        users.append(preference)
        items.append(model.projection[m](features))
    return Embeddings(torch.cat(users, dim=-1), torch.cat(items, dim=-1))


def margin(view: Embeddings, batch: Batch) -> Tensor:
    """Margins of a batch from full tables, one product a score."""
    users = view.users[batch[0]]
    return (users * view.items[batch[1]]).sum(-1) - (users * view.items[batch[2]]).sum(-1)


def published_loss(model: VBPR, teachers: Mapping[str, Embeddings], ranking: Batch, pairs: Batch, config: Config) -> Tensor:
    """The total loss of one step for two modalities, as published."""
    chosen, (a, b) = config.distillation, model.modalities
    joint, only = tables(model, (a, b)), {m: tables(model, (m,)) for m in (a, b)}
    u, i, j = joint.users[ranking[0]], joint.items[ranking[1]], joint.items[ranking[2]]
    whole, alone = margin(joint, ranking), {m: margin(only[m], ranking) for m in (a, b)}
    loss = -F.logsigmoid(whole).mean() + model.l2 * 0.5 * ((u**2).sum() + (i**2).sum() + (j**2).sum()) / len(ranking[0])
    part = {}
    for m in (a, b):
        specific = torch.clamp(margin(teachers[m], ranking) - alone[m], 0)
        p = (margin(teachers[m], pairs) / chosen.temperature).sigmoid()
        q = (margin(only[m], pairs) / chosen.temperature).sigmoid()
        part[m] = specific + chosen.kappa * -(p * (q + 1e-8).log() + (1 - p) * (1 - q + 1e-8).log()).mean()
    effect_a = torch.clamp((whole - alone[b]) / alone[a], 1e-8, 10).detach()
    effect_b = torch.clamp((whole - alone[a]) / alone[b], 1e-8, 10).detach()
    weight_a = 1 - (effect_a - effect_b) / (effect_a + effect_b)
    return loss + (chosen.rho * (weight_a * part[a] + (2 - weight_a) * part[b])).mean()


class PublishedSampler:
    """Triples drawn one user at a time with Python's and numpy's generators."""

    def __init__(self, dataset: Dataset, config: Config) -> None:
        train = dataset.train
        self.users = train.users.tolist()
        self.items = {u: train.items[train.indptr[u] : train.indptr[u + 1]].tolist() for u in self.users}
        self.n_items, self.batch, self.pairs_batch = dataset.n_items, config.training.batch_size, config.distillation.batch_size
        self.python, self.numpy = random.Random(config.seed), np.random.default_rng(config.seed)

    def draw(self, n: int) -> list[int]:
        return self.python.sample(self.users, n) if n <= len(self.users) else self.python.choices(self.users, k=n)

    def ranking(self) -> Batch:
        users, positives, negatives = self.draw(self.batch), [], []
        for user in users:
            own = self.items[user]
            positives.append(own[int(self.numpy.integers(len(own)))])
            negative = int(self.numpy.integers(self.n_items))
            while negative in own:
                negative = int(self.numpy.integers(self.n_items))
            negatives.append(negative)
        return torch.tensor(users), torch.tensor(positives), torch.tensor(negatives)

    def pairs(self) -> Batch:
        items = torch.from_numpy(self.numpy.integers(self.n_items, size=(2, self.pairs_batch)))
        return torch.tensor(self.draw(self.pairs_batch)), items[0], items[1]


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
            resolve(config.flat(), {"training.epochs": arguments.teacher_epochs}), build_trainer(config, select(dataset, (m,)), f"teacher/{m}")
        )
        fit.advance()
        fit.trainer.restore(fit.best)
        teachers[m] = fit.trainer.soft_scores()
        print(f"teacher {m}: best epoch {fit.stopping.best_epoch}, validation Recall@20 {fit.stopping.best:.4f}", flush=True)

    ours, published = (build_trainer(config, dataset, "student", distilled=True) for _ in range(2))
    model, sampler = published.backbone, PublishedSampler(dataset, config)
    assert isinstance(model, VBPR)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.training.learning_rate)
    seconds = {"published": 0.0, "ours": 0.0}
    steps, dtype = ours.stream.steps_per_epoch, DTYPES[config.distillation.margin_dtype]

    def sheets(triples: Sequence[StepTriples]) -> dict[str, np.ndarray]:
        return {m: margin_sheet(embeddings, triples, dtype) for m, embeddings in teachers.items()}

    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        for _ in range(steps):
            loss = published_loss(model, teachers, sampler.ranking(), sampler.pairs(), config)
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
