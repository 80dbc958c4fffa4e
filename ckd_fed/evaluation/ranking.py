"""Rank every item for every user that has held-out items, in blocks of users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.backbones.base import Embeddings
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import TrainingError
from ckd_fed.evaluation.metrics import RankingMetrics

_BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 24}  # scores held at a time: 4 MB in float32, which a CPU's cache holds; fewer launches on a GPU
_BLOCK_USERS = 64  # at least, or a block costs a pass over the items' table: 9.5 ms a user of 500,000 items with 8 users, 4.2 ms with 64


def evaluate(
    embeddings: Embeddings,
    train: Interactions,
    held_out: Interactions,
    ks: Sequence[int] = (10, 20),
    share: tuple[int, int] = (0, 1),
    among: np.ndarray | None = None,
) -> RankingMetrics:
    """Full ranking with the users' training items masked.

    As in the published protocol: all items compete, validation items are not masked at test time, and users without training items
    count like others.

    Args:
        embeddings: tables whose inner products are the scores, on any device.
        train: items to mask.
        held_out: relevant items; users without any are not counted.
        ks: cut-offs.
        share: (w, W): of the users with held-out items, count those at positions congruent to w modulo W.
        among: the items that compete, ``(n_items,)`` bool; others are neither ranked nor relevant. None for all.

    Raises:
        TrainingError: an embedding is not finite.
    """
    worker, workers = share
    if among is not None:
        held_out = held_out.of_items(among)
    users = held_out.users[worker::workers]
    longest = min(max(ks), train.n_items)
    metrics = RankingMetrics(tuple(sorted(ks)))
    metrics.update(np.zeros((0, max(ks)), dtype=bool), np.zeros(0, dtype=np.int64))  # a share without users has sums too: 0
    for chunk, top in top_items(embeddings, train, users, longest, among):
        hits = held_out.contains(chunk[:, None], top)
        if longest < max(ks):  # fewer items than K: the list ends early
            hits = np.pad(hits, ((0, 0), (0, max(ks) - longest)))
        metrics.update(hits, held_out.degree[chunk])
    return metrics


@torch.no_grad()
def top_items(
    embeddings: Embeddings, train: Interactions, users: np.ndarray, k: int, among: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The best items of some users, block by block, training items left out.

    Args:
        embeddings: tables whose inner products are the scores, on any device.
        train: items to mask.
        users: ids, ``(n,)``.
        k: length of the lists, at most the number of items.
        among: the items that compete, ``(n_items,)`` bool; None for all.

    Yields:
        A block's users ``(b,)`` and their items ``(b, k)``, best first; masked items come last where a user has fewer others.

    Raises:
        TrainingError: an embedding is not finite.
    """
    for table in embeddings:
        if table.numel() and not torch.isfinite(torch.stack(torch.aminmax(table))).all():  # no temporary of the table's size, as isfinite has two of
            raise TrainingError("the embeddings hold NaN or infinite values, so nothing can be ranked; lower training.learning-rate")
    out = None if among is None else torch.from_numpy(np.flatnonzero(~among)).to(embeddings.items.device)
    for chunk, seen, (scores,) in score_blocks([embeddings], train, users):
        scores[seen] = -torch.inf
        if out is not None:
            scores[:, out] = -torch.inf
        yield chunk, scores.topk(min(k, train.n_items), dim=1).indices.cpu().numpy()


def score_blocks(
    tables: Sequence[Embeddings], train: Interactions, users: np.ndarray
) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor], list[Tensor]]]:
    """Scores of all items for some users, block by block, under one or more tables.

    Yields:
        users of the block ``(b,)``; the entries to mask, (row in the block, item) of every training item; and for every table the
        scores ``(b, n_items)``, not masked yet and overwritten by the next block.
    """
    device = tables[0].items.device
    items = [table.items.T.contiguous() for table in tables]
    scores_held = _BLOCK_SCORES.get(device.type, _BLOCK_SCORES["cpu"])
    block = min(max(_BLOCK_USERS, scores_held // train.n_items), max(1, len(users)))
    # Scores are written in place: small results that are kept between large temporaries leave holes that nothing large fits into, and
    # memory would grow to that of all scores.
    buffers = [table.items.new_empty(block, train.n_items) for table in tables]
    for start in range(0, len(users), block):
        chunk = users[start : start + block]
        index = torch.from_numpy(chunk).to(device)
        scores = [
            torch.mm(F.embedding(index, table.users), transposed, out=buffer[: len(chunk)])
            for table, transposed, buffer in zip(tables, items, buffers, strict=True)
        ]
        yield chunk, entries(train, chunk, device), scores


def entries(interactions: Interactions, users: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(position in ``users``, item) of every interaction of some users."""
    degree = interactions.degree[users]
    first = np.repeat(interactions.indptr[users] - np.concatenate([[0], np.cumsum(degree)[:-1]]), degree)
    row, item = np.repeat(np.arange(len(users)), degree), interactions.items[first + np.arange(degree.sum())]
    return torch.from_numpy(row).to(device), torch.from_numpy(item).to(device)
