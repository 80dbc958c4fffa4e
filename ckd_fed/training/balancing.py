r"""Balancing without teachers: two published ways for the plain student, to compare distillation with.

**Gradient modulation** in the manner of OGM-GE (Peng, Wei, Deng, Wang, Hu. "Balanced Multimodal Learning via On-the-fly Gradient
Modulation". CVPR 2022, arXiv:2203.15332). A modality that is ahead of the others is slowed down:

.. math:: s_m = \frac1B\sum_n \sigma(d_{only\,m}[n]), \quad
          r_m = s_m \Big/ \tfrac{1}{|M|-1}\textstyle\sum_{k \ne m} s_k, \quad
          k_m = 1 - \tanh(\alpha\, r_m) \text{ if } r_m > 1 \text{ else } 1

The paper classifies; there s is the softmax score of the right class, here the probability that the right item of a pair comes first.
The paper multiplies the modality's gradients by k and adds Gaussian noise of the gradients' standard deviation (GE, generalisation
enhancement). Adam divides every gradient by its own size, which would cancel k, so here k multiplies the modality's *step* (with plain
SGD, the paper's optimiser, the two are the same); and the noise goes only to entries that have a gradient, because Adam would turn noise
on the embeddings of users outside the batch into full steps.

**Modality dropout** (Neverova, Wolf, Taylor, Nebout. "ModDrop". TPAMI 2016, arXiv:1501.00102): for every sample each modality is absent
with probability p, at least one being kept, and the BPR loss is taken on the margin of the view that is left:

.. math:: \frac1B \sum_n -\log\sigma(d_{V_n}[n]), \quad V_n \subseteq M \text{ drawn, not empty}
"""

from __future__ import annotations

from itertools import combinations
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Triples, View, sum_of
from ckd_fed.config import BalancingConfig
from ckd_fed.distillation.objective import ObjectiveOutput, PlainObjective
from ckd_fed.errors import ConfigError


class Optimizer(Protocol):
    """What changes parameters by their gradients."""

    def step(self) -> object: ...


class Balancing:
    """No balancing: the backbone's own loss, the optimiser's own step. The base of the others.

    Attributes:
        reads_gradients: whether :meth:`step` does.
        static_steps: as :attr:`~ckd_fed.backbones.base.Backbone.static_steps`.
    """

    reads_gradients = False
    static_steps = True

    def __init__(self) -> None:
        self._plain = PlainObjective()

    def start_epoch(self, generator: torch.Generator) -> None:
        """Take the epoch's own randomness (on the CPU, so that every device draws the same)."""

    def loss(self, backbone: Backbone, ranking: Triples) -> ObjectiveOutput:
        """The loss of one step over a ranking batch."""
        return self._plain(backbone, ranking)

    def step(self, backbone: Backbone, optimizer: Optimizer) -> None:
        """Move the parameters after the loss's backward pass."""
        optimizer.step()


class GradientModulation(Balancing):
    """OGM-GE; see the module's text.

    Args:
        alpha: how strongly a modality that is ahead is slowed down.
        noise: whether to add the noise (GE).

    Attributes:
        coefficients: k of every modality in the last step.
    """

    reads_gradients = True
    static_steps = False

    def __init__(self, alpha: float, noise: bool) -> None:
        super().__init__()
        self.alpha = alpha
        self.noise = noise
        self.coefficients: dict[str, float] = {}
        self._generator = torch.Generator()

    def start_epoch(self, generator: torch.Generator) -> None:
        self._generator = generator

    def loss(self, backbone: Backbone, ranking: Triples) -> ObjectiveOutput:
        """The backbone's own loss; the coefficients are set by the way."""
        output = backbone.step(ranking, [backbone.only(m) for m in backbone.modalities])
        scores = torch.stack([output.ranking[backbone.only(m)].detach().sigmoid().mean() for m in backbone.modalities])  # (|M|,)
        others = (scores.sum() - scores) / (len(scores) - 1)
        ratios = scores / others.clamp_min(1e-12)
        values = torch.where(ratios > 1, 1 - torch.tanh(self.alpha * ratios), torch.ones_like(ratios)).tolist()
        self.coefficients = dict(zip(backbone.modalities, values, strict=True))
        loss = sum_of(output.loss_terms.values())
        return ObjectiveOutput(loss, output.loss_terms, output.ranking[backbone.joint])

    @torch.no_grad()
    def step(self, backbone: Backbone, optimizer: Optimizer) -> None:
        """A step of which each modality's own parameters go the k-th part."""
        before: list[tuple[Tensor, Tensor, float]] = []
        for m, parameters in own_parameters(backbone).items():
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:  # or its table would be moved on row by row, and not as here
                    parameter.grad = parameter.grad.to_dense()
                gradient = parameter.grad
                if self.noise and gradient.numel() > 1:  # a single number has no deviation
                    drawn = torch.randn(gradient.shape, generator=self._generator).to(gradient)
                    gradient += drawn * (gradient.std() + 1e-8) * (gradient != 0)
                if self.coefficients[m] < 1:
                    before.append((parameter, parameter.clone(), self.coefficients[m]))
        optimizer.step()
        for parameter, old, coefficient in before:
            parameter.copy_(old + coefficient * (parameter - old))


class ModalityDropout(Balancing):
    """Modality dropout per sample; see the module's text.

    Args:
        rate: probability p of each modality's absence, under 1.
    """

    static_steps = False

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._generator = torch.Generator()

    def start_epoch(self, generator: torch.Generator) -> None:
        self._generator = generator

    def loss(self, backbone: Backbone, ranking: Triples) -> ObjectiveOutput:
        """BPR on each sample's drawn view, the backbone's other terms as they are."""
        views = [frozenset(chosen) for size in range(1, len(backbone.modalities) + 1) for chosen in combinations(backbone.modalities, size)]
        output = backbone.step(ranking, views)
        if "bpr" not in output.loss_terms:
            raise ConfigError(f"balancing.method is 'modality-dropout', which needs a backbone with a BPR loss; {type(backbone).__name__} has none")
        which = self._draw(backbone, views, len(ranking)).to(output.ranking[backbone.joint].device)  # (B,)
        margins = torch.stack([output.ranking[view] for view in views])  # (views, B)
        margin = margins.gather(0, which[None]).squeeze(0)
        terms = {**output.loss_terms, "bpr": -F.logsigmoid(margin).mean()}
        return ObjectiveOutput(sum_of(terms.values()), terms, output.ranking[backbone.joint])

    def _draw(self, backbone: Backbone, views: list[View], n: int) -> Tensor:
        """Index of each sample's view, ``(n,)``: independent absences, given that not all are absent."""
        present = torch.tensor([len(view) for view in views], dtype=torch.float64)
        chances = (1 - self.rate) ** present * self.rate ** (len(backbone.modalities) - present)
        return torch.multinomial(chances, n, replacement=True, generator=self._generator)


def own_parameters(backbone: Backbone) -> dict[str, list[Tensor]]:
    """Modality -> the parameters that are its own: those with its name, and no other's, as a part of theirs (``projection.text.weight``).

    What lies between two modalities (EgoGCN's ``gate.image.text.weight``) is neither's.

    Raises:
        ConfigError: a modality has none.
    """
    found: dict[str, list[Tensor]] = {m: [] for m in backbone.modalities}
    for name, parameter in backbone.named_parameters():
        named = set(name.split(".")) & set(found)
        if len(named) == 1:
            found[named.pop()].append(parameter)
    for m, parameters in found.items():
        if not parameters:
            raise ConfigError(f"balancing.method is 'gradient-modulation', but {type(backbone).__name__} has no parameters of modality {m!r} alone")
    return found


def build_balancing(config: BalancingConfig, backbone: Backbone) -> Balancing:
    """The configured balancing for a plain student.

    Raises:
        ConfigError: the backbone's scores do not depend on features, so there is nothing to balance by.
    """
    if config.method == "none":
        return Balancing()
    if not backbone.scores_use_features:
        raise ConfigError(f"balancing.method is {config.method!r}, but the scores of {type(backbone).__name__} do not depend on features")
    if config.method == "gradient-modulation":
        return GradientModulation(config.alpha, config.noise)
    return ModalityDropout(config.rate)
