"""An epoch's batches as tensors, several steps at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.base import Triples
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import asked_about
from ckd_fed.distillation.objective import TeacherMargins

AHEAD = 16  # steps; 2 MB of triples and 0.4 MB of margins a modality at the published batch sizes


class Batch(NamedTuple):
    """What one step trains on.

    Attributes:
        ranking: the ranking batch, B triples.
        distillation: the distillation batch, K triples; None without teachers.
        margins: modality -> what its teacher says of the step; empty without teachers.
    """

    ranking: Triples
    distillation: Triples | None
    margins: dict[str, TeacherMargins]


def batches(
    steps: Iterable[StepTriples], sheets: Mapping[str, np.ndarray] | None, masks: Mapping[str, np.ndarray], device: torch.device, dtype: torch.dtype
) -> Iterator[Batch]:
    """The batches of some steps, on the device some steps ahead of their use: an upload for each would make the host wait for the steps before.

    Args:
        steps: triples, in order; all of the same B and K.
        sheets: modality -> :func:`~ckd_fed.distillation.margins.margin_sheet` of these steps; None without teachers.
        masks: modality -> which items have it, ``(n_items,)`` bool; a modality that all items have is absent.
        device, dtype: of the parameters.
    """
    remaining, row = iter(steps), 0
    while chunk := list(islice(remaining, AHEAD)):
        size = chunk[0].ranking.shape[1]
        parts = [step.ranking if sheets is None else np.concatenate([step.ranking, step.distillation], axis=1) for step in chunk]
        triples = _upload(np.stack(parts), device).long()  # (steps, 3, B + K)
        margins = {m: _upload(sheet[row : row + len(chunk)], device).to(dtype) for m, sheet in (sheets or {}).items()}
        # (steps, B + K), of the modalities that some items lack
        asked = {m: _upload(np.stack([asked_about(masks[m], part) for part in parts]), device) for m in margins if m in masks}
        for n, step in enumerate(triples):
            said = {m: _of_step(values[n], asked[m][n] if m in asked else None, size) for m, values in margins.items()}
            yield Batch(Triples(*step[:, :size]), None if sheets is None else Triples(*step[:, size:]), said)
        row += len(chunk)


def _of_step(margins: Tensor, asked: Tensor | None, size: int) -> TeacherMargins:
    return TeacherMargins(margins[:size], margins[size:], *((None, None) if asked is None else (asked[:size], asked[size:])))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device: sheets from the wire are read-only."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
