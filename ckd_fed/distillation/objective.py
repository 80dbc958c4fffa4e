"""The objective of a distilled student's step: its own loss plus counterfactually weighted distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Triples, View
from ckd_fed.distillation.effects import causal_effects, modality_weights
from ckd_fed.distillation.losses import generic_loss, specific_loss


@dataclass(frozen=True)
class TeacherMargins:
    """What a teacher of one modality says about one step's triples.

    Attributes:
        ranking: margins of the ranking batch, ``(B,)``.
        distillation: margins of the distillation batch, ``(K,)``.
        asked_ranking, asked_distillation: which triples it was asked about, ``(B,)`` and ``(K,)`` bool: those of which both items have
            its modality. None where all items have it. Margins of the others mean nothing.
    """

    ranking: Tensor
    distillation: Tensor
    asked_ranking: Tensor | None = None
    asked_distillation: Tensor | None = None


@dataclass
class ModalityTerms:
    """One modality's part in a step: scalars, or per-sample ``(B,)`` where so noted."""

    margin: Tensor  # (B,) of the student's only-m view
    specific: Tensor  # (B,)
    generic: Tensor  # scalar
    effect: Tensor  # (B,)
    weight: Tensor  # (B,)
    asked: Tensor | None = None  # (B,) bool; None for all
    asked_pairs: Tensor | None = None  # (K,) bool; None for all

    def means(self, *, counterfactual: bool) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Scalars for the log, with effect and weight where they mean anything.

        Returns:
            Name -> mean over the samples that the teacher was asked about, and their share of all: what the mean counts for when steps
            are averaged.
        """
        pairs = 1.0 if self.asked_pairs is None else self.asked_pairs.double().mean()
        values = {"specific": self.specific, **({"effect": self.effect, "weight": self.weight} if counterfactual else {})}
        if self.asked is None:
            return {"generic": (self.generic, pairs), **{name: (value.mean(), 1.0) for name, value in values.items()}}
        n, share = self.asked.sum().clamp(min=1), self.asked.double().mean()
        return {"generic": (self.generic, pairs), **{name: ((value * self.asked).sum() / n, share) for name, value in values.items()}}


@dataclass
class ObjectiveOutput:
    """Every number of one step.

    Attributes:
        loss: the total that is minimised.
        terms: the parts of the total: the backbone's own loss terms and ``kd``.
        joint_margin: ``(B,)``.
        per_sample: distillation loss per sample before rho and the mean, ``(B,)``.
        modalities: the parts of each modality; empty without distillation.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    joint_margin: Tensor
    per_sample: Tensor | None = None
    modalities: dict[str, ModalityTerms] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillationObjective:
    """CKD's objective for any number of modalities.

    ``L = BPR + L2 + L_kd``, ``L_kd = rho * mean_n sum_m w_m[n] * (h_m[n] + kappa * g_m)``

    Args:
        rho: weight of distillation as a whole.
        kappa: weight of the generic loss against the specific one.
        temperature: t of the generic loss.
        reweight: per-sample counterfactual weights; False gives every modality weight 1 (ablation). Effects are computed and
            reported all the same.
        specific: include the specific loss (ablation switch).
        generic: include the generic loss (ablation switch).
    """

    rho: float = 0.01
    kappa: float = 5.0
    temperature: float = 0.1
    reweight: bool = True
    specific: bool = True
    generic: bool = True

    def __call__(self, student: Backbone, ranking: Triples, distillation: Triples, teachers: Mapping[str, TeacherMargins]) -> ObjectiveOutput:
        """Compute one step's loss.

        Args:
            student: the multimodal student.
            ranking: ranking batch, B triples.
            distillation: distillation batch, K triples.
            teachers: modality -> its teacher's margins. A modality of the student without a teacher is left out of the sum, and so is,
                sample by sample, one whose teacher was not asked.
        """
        only = {m: student.only(m) for m in student.modalities}
        without = {m: student.without(m) for m in student.modalities}
        taught = [m for m in student.modalities if m in teachers]
        # Effects have no gradient: of three modalities or more, nobody differentiates the views without one.
        with student.constant({*without.values()} - {*only.values()}):
            output = student.step(ranking, [*only.values(), *without.values()], distillation, [only[m] for m in taught])
        margins: dict[View, Tensor] = output.ranking

        detached = {view: margin.detach() for view, margin in margins.items()}
        effects = causal_effects(detached[student.joint], {m: detached[v] for m, v in without.items()}, {m: detached[v] for m, v in only.items()})
        if self.reweight and len(taught) > 1:
            asked = {m: mask for m in taught if (mask := teachers[m].asked_ranking) is not None}
            weights = modality_weights({m: effects[m] for m in taught}, asked)
        else:
            weights = {m: _ones(detached[student.joint], teachers[m].asked_ranking) for m in taught}

        parts: dict[str, ModalityTerms] = {}
        per_sample = torch.zeros_like(detached[student.joint])
        for m in taught:
            h = specific_loss(teachers[m].ranking, margins[only[m]])
            g = generic_loss(teachers[m].distillation, output.distillation[only[m]], self.temperature, teachers[m].asked_distillation)
            asked_of_m = teachers[m].asked_ranking, teachers[m].asked_distillation
            parts[m] = ModalityTerms(margins[only[m]], h, g, effects[m], weights[m], *asked_of_m)
            if self.specific:
                per_sample = per_sample + weights[m] * h
            if self.generic:
                per_sample = per_sample + weights[m] * (self.kappa * g)
        kd = self.rho * per_sample.mean()
        terms = {**output.loss_terms, "kd": kd}
        return ObjectiveOutput(torch.stack(list(terms.values())).sum(), terms, margins[student.joint], per_sample, parts)


def _ones(like: Tensor, asked: Tensor | None) -> Tensor:
    return torch.ones_like(like) if asked is None else asked.to(like.dtype)


@dataclass(frozen=True)
class PlainObjective:
    """A backbone's own loss alone: a teacher, or the plain student that distillation is compared with."""

    def __call__(self, backbone: Backbone, ranking: Triples) -> ObjectiveOutput:
        """Compute one step's loss; see :meth:`Backbone.losses`."""
        output = backbone.step(ranking)
        return ObjectiveOutput(torch.stack(list(output.loss_terms.values())).sum(), output.loss_terms, output.ranking[backbone.joint])
