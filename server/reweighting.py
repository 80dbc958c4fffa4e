"""Server-side state of the counterfactual reweighting: effects and weights of every round, merged over the student workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class RoundState:
    """One round, merged: modality -> mean effect, its share of all effects, mean weight."""

    effects: dict[str, float]
    shares: dict[str, float]
    weights: dict[str, float]


@dataclass
class Reweighting:
    """Causal effects and weights over the rounds.

    Per sample, effects and weights are computed where the student's margins are, on the workers. Here their means, checked on arrival,
    are merged by samples and kept.

    Attributes:
        modalities: that have a teacher; none where the backbone's scores do not depend on features.
        rounds: round number -> merged state.
    """

    modalities: tuple[str, ...]
    rounds: dict[int, RoundState] = field(default_factory=dict)

    def merge(self, number: int, reports: Sequence[Mapping[str, float]], samples: Sequence[int]) -> dict[str, float]:
        """Merge the workers' means of one round by the samples that they are over.

        Args:
            number: of the round.
            reports: each worker's metrics, see :func:`merged_mean`.
            samples: each worker's number of samples.

        Returns:
            ``effect/m``, ``effect_share/m`` and ``weight/m`` for every modality; empty without teachers.
        """
        if not self.modalities:
            return {}
        effects = {m: merged_mean(f"effect/{m}", reports, samples) for m in self.modalities}
        weights = {m: merged_mean(f"weight/{m}", reports, samples) for m in self.modalities}
        shares = {m: effect / sum(effects.values()) for m, effect in effects.items()}
        self.rounds[number] = state = RoundState(effects, shares, weights)
        kinds = {"effect": state.effects, "effect_share": state.shares, "weight": state.weights}
        return {f"{kind}/{m}": value for kind, values in kinds.items() for m, value in values.items()}


def merged_mean(name: str, reports: Sequence[Mapping[str, float]], samples: Sequence[int]) -> float:
    """Mean of a metric over the samples of all workers.

    Args:
        name: of the metric.
        reports: each worker's mean of it; and, as ``asked/<name>``, over what share of its samples, where it is not over all of them.
        samples: each worker's.
    """
    counted = [n * report.get(f"asked/{name}", 1.0) for n, report in zip(samples, reports, strict=True)]
    return float(np.average([report[name] for report in reports], weights=counted if any(counted) else None))


def average_weights(parameters: Sequence[Mapping[str, np.ndarray]], samples: Sequence[int]) -> dict[str, np.ndarray]:
    """Parameters of several workers averaged by samples (FedAvg, McMahan et al. 2017), summed in float64; one worker's stay untouched."""
    if len(parameters) == 1:
        return dict(parameters[0])
    total = sum(samples)
    averaged = {}
    for name, first in parameters[0].items():
        mean = sum(worker[name].astype(np.float64) * (n / total) for worker, n in zip(parameters, samples, strict=True))
        averaged[name] = np.asarray(mean).astype(first.dtype)
    return averaged
