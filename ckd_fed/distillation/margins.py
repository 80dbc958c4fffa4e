"""Soft scores as sheets of margins: the only thing that leaves a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.gather import differences
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.objective import TeacherMargins

DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


def largest_margin(dtype: np.dtype, bound: float) -> float:
    """The largest number of a dtype that does not exceed a bound."""
    limit = np.asarray(min(bound, float(np.finfo(dtype).max)), dtype=dtype)
    return float(limit if float(limit) <= bound else np.nextafter(limit, np.zeros_like(limit)))


@torch.no_grad()
def margin_sheet(teacher: Embeddings, steps: Sequence[StepTriples], dtype: np.dtype, bound: float = math.inf) -> np.ndarray:
    """A teacher's margins for the triples of some steps.

    Args:
        teacher: the teacher's embedding tables.
        steps: triples, in order; all of the same B and K.
        dtype: float16 (as sent by default) or float32.
        bound: margins beyond it, or beyond the range of the dtype, are clipped.

    Returns:
        ``(len(steps), B + K)``: ranking margins, then distillation margins.
    """
    if not steps:
        return np.empty((0, 0), dtype=dtype)
    device, limit = teacher.users.device, largest_margin(dtype, bound)
    sheet = np.empty((len(steps), steps[0].ranking.shape[1] + steps[0].distillation.shape[1]), dtype=dtype)
    for row, triples in zip(sheet, steps, strict=True):
        users, first, second = torch.from_numpy(np.concatenate([triples.ranking, triples.distillation], axis=1)).long().to(device)
        margin = (F.embedding(users, teacher.users) * differences(teacher.items, (first, second))).sum(-1)
        row[:] = margin.clamp(-limit, limit).cpu().numpy()
    return sheet


def teacher_margins(sheets: Mapping[str, np.ndarray], row: int, batch_size: int, like: torch.Tensor) -> dict[str, TeacherMargins]:
    """One step's rows of all teachers' sheets, as tensors of the dtype and device of ``like``."""
    found = {}
    for modality, sheet in sheets.items():
        margins = torch.tensor(sheet[row]).to(device=like.device, dtype=like.dtype)  # a copy: sheets from the wire are read-only
        found[modality] = TeacherMargins(margins[:batch_size], margins[batch_size:])
    return found
