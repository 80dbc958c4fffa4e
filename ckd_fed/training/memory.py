"""Teachers that were trained already: runs of a sweep that differ in distillation alone need not train the same ones again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ckd_fed.config import Config
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.missing import hide
from ckd_fed.training.early_stopping import EarlyStopping
from ckd_fed.training.fit import Fit
from ckd_fed.training.means import Values

# What a learner of phase 1 does not depend on, or depends on through its data, which count as they are. Everything else counts, so that
# a key added later counts too.
_BESIDE = (
    "distillation.", "tracking.", "name", "recipe", "plain", "home", "federation.", "evaluation.calibrate",
    "data.dir", "data.modalities", "data.standin", "data.missing",
)  # fmt: skip


@dataclass(frozen=True)
class _Stretch:
    """What a stretch of training came to: the fit's state after it, and its rows."""

    epoch: int
    stopping: EarlyStopping
    best: Mapping[str, Tensor]
    rows: list[Values]


class TeacherMemory:
    """Remembers every learner that was trained to its end, stretch by stretch.

    A remembered learner goes through the same epochs, early stopping and best parameters with the same rows, ``seconds`` being those of its
    training. The parameters of its trainer stay as they are, so before its end it can neither be trained on nor be saved to be trained on later.
    """

    def __init__(self) -> None:
        self._whole: dict[str, dict[int, _Stretch]] = {}
        self._begun: dict[str, dict[int, _Stretch]] = {}

    def advance(self, config: Config, dataset: Dataset, role: str, fit: Fit) -> list[Values]:
        """As :meth:`Fit.advance` for a teacher round: out of memory where this learner was trained before, else by training it.

        Args:
            config: the run's configuration.
            dataset: of the run.
            role: ``teacher/<m>`` or ``plain``.
            fit: the learner, at the beginning or where the previous round left it.
        """
        key, start = learner_key(config, dataset, role), fit.epoch
        if key in self._whole:
            known = self._whole[key][start]
            fit.epoch, fit.stopping, fit.best = known.epoch, copy.copy(known.stopping), dict(known.best)
            return [dict(row) for row in known.rows]
        rows = fit.advance(config.teacher_round)
        stretches = self._begun.setdefault(key, {})
        stretches[start] = _Stretch(fit.epoch, copy.copy(fit.stopping), dict(fit.best), [dict(row) for row in rows])
        if fit.done:
            self._whole[key] = self._begun.pop(key)
        return rows

    def remembers(self, config: Config, dataset: Dataset, role: str) -> bool:
        """Whether a learner was trained to its end before; arguments as for :meth:`advance`."""
        return learner_key(config, dataset, role) in self._whole


def learner_key(config: Config, dataset: Dataset, role: str) -> str:
    """Equal for two runs exactly if a learner of phase 1 comes out the same in both: data, backbone, seed, training, role."""
    modalities = [role.removeprefix("teacher/")] if role.startswith("teacher/") else list(dataset.modalities)
    hidden = hide(dataset, config.data.hidden_shares, config.seed)
    features = {m: one for m, one in hidden.feature_fingerprints.items() if m in modalities}
    beside = (*_BESIDE, "balancing.") if role.startswith("teacher/") else _BESIDE
    settings = {key: value for key, value in config.flat().items() if not key.startswith(beside)}
    return json.dumps([role, modalities, dataset.fingerprint, features, config.teacher_round, settings], sort_keys=True)
