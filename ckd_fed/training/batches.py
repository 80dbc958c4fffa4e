"""An epoch's batches as tensors, several steps at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.base import Triples
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.distil import TeacherMargins
from ckd_fed.distillation.margins import asked_about

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


@dataclass(frozen=True)
class Packed:
    """A step's batch as it is uploaded: few tensors, of which :meth:`batch` is made of views.

    Attributes:
        triples: of the ranking batch and, with teachers, of the distillation batch after it, ``(3, B)`` or ``(3, B + K)`` int64.
        size: B.
        margins: modality -> its teacher's margins, ``(B + K,)``; empty without teachers.
        asked: modality -> which triples its teacher was asked about, ``(B + K,)`` bool; of the modalities that some items lack.
        taught: whether there are teachers.
    """

    triples: Tensor
    size: int
    margins: dict[str, Tensor]
    asked: dict[str, Tensor]
    taught: bool

    def batch(self) -> Batch:
        """Both batches and what the teachers say of them."""
        ranking = Triples(*self.triples[:, : self.size])
        if not self.taught:
            return Batch(ranking, None, {})
        said = {m: _said(values, self.asked.get(m), self.size) for m, values in self.margins.items()}
        return Batch(ranking, Triples(*self.triples[:, self.size :]), said)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        return [self.triples, *self.margins.values(), *self.asked.values()]

    def copy(self) -> Packed:
        """The same in memory of its own."""
        margins, asked = ({m: tensor.clone() for m, tensor in of.items()} for of in (self.margins, self.asked))
        return Packed(self.triples.clone(), self.size, margins, asked, self.taught)


def batches(
    steps: Iterable[StepTriples], sheets: Mapping[str, np.ndarray] | None, masks: Mapping[str, np.ndarray], device: torch.device, dtype: torch.dtype
) -> Iterator[Packed]:
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
            mine, whom = ({m: of_steps[n] for m, of_steps in of.items()} for of in (margins, asked))
            yield Packed(step, size, mine, whom, sheets is not None)
        row += len(chunk)


def _said(margins: Tensor, asked: Tensor | None, size: int) -> TeacherMargins:
    return TeacherMargins(margins[:size], margins[size:], *((None, None) if asked is None else (asked[:size], asked[size:])))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device: sheets from the wire are read-only."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
