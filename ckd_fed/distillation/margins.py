"""Soft scores as sheets of margins: the only thing that leaves a teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.block_margins import triple_margins
from ckd_fed.data.triples import StepTriples
from ckd_fed.kernels import kernels

DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


def _at_once(device: torch.device) -> int:
    """Steps that go together: for each upload the host waits for a GPU, and a call has its price, but what torch gathers should fit the cache."""
    if device.type == "cpu":
        return 4 if kernels() else 1
    return 16


def largest_margin(dtype: np.dtype, bound: float) -> float:
    """The largest number of a dtype that does not exceed a bound."""
    limit = np.asarray(min(bound, float(np.finfo(dtype).max)), dtype=dtype)
    return float(limit if float(limit) <= bound else np.nextafter(limit, np.zeros_like(limit)))


@torch.no_grad()
def margin_sheet(
    teacher: Embeddings, steps: Sequence[StepTriples], dtype: np.dtype, bound: float = math.inf, mask: np.ndarray | None = None
) -> np.ndarray:
    """A teacher's margins for the triples of some steps.

    Args:
        teacher: the teacher's embedding tables.
        steps: triples, in order; all of the same B and K.
        dtype: float16 (as sent by default) or float32.
        bound: margins beyond it, or beyond the range of the dtype, are clipped.
        mask: which items the teacher's modality is known of, ``(n_items,)`` bool. It says nothing of other items: a triple with one of
            them is left 0.

    Returns:
        ``(len(steps), B + K)``: ranking margins, then distillation margins.
    """
    if not steps:
        return np.empty((0, 0), dtype=dtype)
    device, limit = teacher.users.device, largest_margin(dtype, bound)
    sheet = np.empty((len(steps), steps[0].ranking.shape[1] + steps[0].distillation.shape[1]), dtype=dtype)
    at_once = _at_once(device)
    for start in range(0, len(steps), at_once):
        rows = sheet[start : start + at_once]
        parts = [part for step in steps[start : start + at_once] for part in (step.ranking, step.distillation)]
        triples = np.concatenate(parts, axis=1, dtype=np.int64)
        margin = triple_margins(teacher.users, teacher.items, *torch.from_numpy(triples).to(device))
        rows[:] = margin.clamp_(-limit, limit).view(rows.shape).cpu().numpy()
        if mask is not None:
            rows[~asked_about(mask, triples).reshape(rows.shape)] = 0
    return sheet


def asked_about(mask: np.ndarray, triples: np.ndarray) -> np.ndarray:
    """Which triples a teacher is asked about: those of which both items have its modality.

    Args:
        mask: which items have it, ``(n_items,)`` bool.
        triples: ``(3, n)``: user and two items.

    Returns:
        ``(n,)`` bool.
    """
    return mask[triples[1]] & mask[triples[2]]
