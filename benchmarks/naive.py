"""The same mathematics in the manner of the published code: what the benchmarks compare this package with.

Written anew from the formulas. Its manner is what costs there: every view by a full pass over the catalogue, absent features tiled to
full matrices, one product a score, sparse matrices in coordinate form, gradients taken through frozen graph teachers, triples drawn
user by user in Python, users ranked one at a time in Python, plain Adam. It works on this package's backbones, so that both compute
with the same parameters.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Embeddings
from ckd_fed.backbones.graph import row_normalised_adjacency
from ckd_fed.backbones.mmgcn import MMGCN
from ckd_fed.backbones.vbpr import VBPR
from ckd_fed.config import Config
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.interactions import Interactions

Batch = tuple[Tensor, Tensor, Tensor]
Model = VBPR | MMGCN


def coordinate_adjacency(train: Interactions) -> Tensor:
    """MMGCN's matrix in coordinate form, its entries as they come: users' edges, then items', then the self loops."""
    matrix = row_normalised_adjacency(train)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.argsort(rows == matrix.indices, kind="stable")
    index = torch.from_numpy(np.stack([rows, matrix.indices])[:, order].astype(np.int64))
    return torch.sparse_coo_tensor(index, torch.from_numpy(matrix.data[order]).float(), matrix.shape, check_invariants=False)


def tables(model: Model, present: Sequence[str], adjacency: Tensor | None = None) -> Embeddings:
    """One view by a full pass: features of absent modalities tiled to every item, preferences to every user."""
    if isinstance(model, VBPR):
        users: list[Tensor] = [model.user_embedding]
        items: list[Tensor] = [model.item_embedding]
        for m in model.modalities:
            preference, projected = _block(model, m, present)
            users.append(preference)
            items.append(projected)
        return Embeddings(torch.cat(users, dim=-1), torch.cat(items, dim=-1))
    assert adjacency is not None
    ids = torch.cat([model.user_embedding, model.item_embedding])
    outputs = []
    for m in model.modalities:
        x = F.normalize(torch.cat(_block(model, m, present)))
        branch = model.branch[m]
        for conv, linear, gate in zip(branch.conv, branch.linear, branch.gate, strict=True):  # type: ignore[arg-type]
            hidden = F.leaky_relu(torch.sparse.mm(adjacency, conv(x)))
            x = F.leaky_relu(gate(hidden) + F.leaky_relu(linear(x)) + ids)
        outputs.append(x)
    mean = torch.stack(outputs).mean(0)
    return Embeddings(*torch.split(mean, [model.n_users, model.n_items]))


def _block(model: Model, modality: str, present: Sequence[str]) -> tuple[Tensor, Tensor]:
    features, preference = model.get_buffer(f"features_{modality}"), model.preference[modality]
    if modality not in present:
        features = features.mean(dim=0).tile(model.n_items, 1)
        preference = preference.mean(dim=0).tile(model.n_users, 1)
    return preference, model.projection[modality](features)


def margin(view: Embeddings, batch: Batch) -> Tensor:
    """Margins of a batch from full tables, one product a score."""
    users = view.users[batch[0]]
    return (users * view.items[batch[1]]).sum(-1) - (users * view.items[batch[2]]).sum(-1)


def plain_loss(model: Model, ranking: Batch, adjacency: Tensor | None = None, present: Sequence[str] | None = None) -> Tensor:
    """BPR and L2 of a plain student, or of a teacher.

    Args:
        present: modalities; all by default. The published code's teacher of a modality is the model of all of them with the others absent.
    """
    return _own_loss(model, tables(model, model.modalities if present is None else present, adjacency), ranking)


def absent_l2(model: VBPR, present: Sequence[str]) -> Tensor:
    """The part of a view's L2 term that is that of the absent modalities' constant blocks, which change no margin."""
    blocks = [
        torch.cat([p.mean(0), 2**0.5 * model.projection[m](model.get_buffer(f"mean_features_{m}"))])
        for m, p in model.preference.items()
        if m not in present
    ]
    return model.l2 * 0.5 * torch.cat(blocks).square().sum()


def _own_loss(model: Model, joint: Embeddings, ranking: Batch) -> Tensor:
    u, i, j = joint.users[ranking[0]], joint.items[ranking[1]], joint.items[ranking[2]]
    l2 = model.l2 * 0.5 * ((u**2).sum() + (i**2).sum() + (j**2).sum()) / len(ranking[0])
    return -F.logsigmoid(margin(joint, ranking)).mean() + l2


def distillation_loss(
    model: Model, teachers: Mapping[str, Embeddings | Model], ranking: Batch, pairs: Batch, config: Config, adjacency: Tensor | None = None
) -> Tensor:
    """The total loss of one step for two modalities.

    A teacher is its tables, or a model that is passed over the catalogue within the step.
    """
    chosen, (a, b) = config.distillation, model.modalities
    joint, only = tables(model, (a, b), adjacency), {m: tables(model, (m,), adjacency) for m in (a, b)}
    taught = {m: tables(t, t.modalities, adjacency) if isinstance(t, Backbone) else t for m, t in teachers.items()}
    whole, alone = margin(joint, ranking), {m: margin(only[m], ranking) for m in (a, b)}
    part = {}
    for m in (a, b):
        specific = torch.clamp(margin(taught[m], ranking) - alone[m], 0)
        p = (margin(taught[m], pairs) / chosen.temperature).sigmoid()
        q = (margin(only[m], pairs) / chosen.temperature).sigmoid()
        part[m] = specific + chosen.kappa * -(p * (q + 1e-8).log() + (1 - p) * (1 - q + 1e-8).log()).mean()
    effect_a = torch.clamp((whole - alone[b]) / alone[a], 1e-8, 10).detach()
    effect_b = torch.clamp((whole - alone[a]) / alone[b], 1e-8, 10).detach()
    weight_a = 1 - (effect_a - effect_b) / (effect_a + effect_b)
    return _own_loss(model, joint, ranking) + (chosen.rho * (weight_a * part[a] + (2 - weight_a) * part[b])).mean()


class Sampler:
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


@torch.no_grad()
def recall(view: Embeddings, train: Interactions, held_out: Interactions, k: int = 20, limit: int | None = None) -> float:
    """Recall@k by ranking one user at a time: a dictionary of scores, the k largest by a heap.

    Args:
        limit: only so many users.
    """
    found = []
    for start in range(0, len(held_out.users[:limit]), 1024):
        users = held_out.users[:limit][start : start + 1024]
        scores = (view.users[torch.from_numpy(users)] @ view.items.T).numpy()
        for row, user in zip(scores, users.tolist(), strict=True):
            seen = set(train.items[train.indptr[user] : train.indptr[user + 1]].tolist())
            wanted = held_out.items[held_out.indptr[user] : held_out.indptr[user + 1]].tolist()
            by_item = {item: row[item] for item in range(train.n_items) if item not in seen}
            hits = sum(item in wanted for item in heapq.nlargest(k, by_item, key=by_item.__getitem__))
            found.append(hits / len(wanted))
    return math.fsum(found) / len(found)
