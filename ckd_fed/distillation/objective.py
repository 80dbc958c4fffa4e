"""The objective of a distilled student's step: its own loss plus counterfactually weighted distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Triples
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


@dataclass(frozen=True)
class ModalityTerms:
    """One modality's part in a step."""

    margin: Tensor  # (B,) of the student's only-m view
    specific: Tensor  # (B,)
    generic: Tensor  # scalar
    effect: Tensor  # (B,)
    weight: Tensor  # (B,)
    asked: Tensor | None = None  # (B,) bool; None for all
    asked_pairs: Tensor | None = None  # (K,) bool; None for all


@dataclass(frozen=True)
class DistillationTerms:
    """What distillation adds to a step, of M modalities.

    Attributes:
        modalities: those with a teacher.
        margin: of the student's only-m views, ``(M, B)``.
        specific: ``(M, B)``.
        generic: ``(M,)``.
        effect: ``(M, B)``.
        weight: ``(M, B)``.
        asked: which samples each teacher was asked about, ``(M, B)`` bool; None for all.
        asked_pairs: which pairs, ``(M, K)`` bool; None for all.
    """

    modalities: tuple[str, ...]
    margin: Tensor
    specific: Tensor
    generic: Tensor
    effect: Tensor
    weight: Tensor
    asked: Tensor | None = None
    asked_pairs: Tensor | None = None

    def of(self, modality: str) -> ModalityTerms:
        """One modality's part."""
        parts = (self.margin, self.specific, self.generic, self.effect, self.weight, self.asked, self.asked_pairs)
        n = self.modalities.index(modality)
        return ModalityTerms(*(None if part is None else part[n] for part in parts))  # type: ignore[arg-type]  # only the masks may be None

    def means(self, *, counterfactual: bool) -> tuple[list[str], Tensor, Tensor | None]:
        """Numbers for the log, with effects and weights where they mean anything.

        Returns:
            names, means over the samples that the teacher was asked about, and these samples' share of all: what each mean counts for
            when steps are averaged; None where all teachers were asked about all.
        """
        per_sample = {"specific": self.specific, **({"effect": self.effect, "weight": self.weight} if counterfactual else {})}
        names = [f"{name}/{m}" for name in ("generic", *per_sample) for m in self.modalities]
        if self.asked is None or self.asked_pairs is None:
            return names, torch.cat([self.generic, *(values.mean(1) for values in per_sample.values())]), None
        n, share = self.asked.sum(1).clamp(min=1), self.asked.double().mean(1)
        means = torch.cat([self.generic, *((values * self.asked).sum(1) / n for values in per_sample.values())])
        return names, means, torch.cat([self.asked_pairs.double().mean(1), *[share] * len(per_sample)])


@dataclass
class ObjectiveOutput:
    """Every number of one step.

    Attributes:
        loss: the total that is minimised.
        terms: the parts of the total: the backbone's own loss terms and ``kd``.
        joint_margin: ``(B,)``.
        per_sample: distillation loss per sample before rho and the mean, ``(B,)``.
        distilled: the parts of distillation; None without any.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    joint_margin: Tensor
    per_sample: Tensor | None = None
    distilled: DistillationTerms | None = None

    @property
    def modalities(self) -> dict[str, ModalityTerms]:
        """The parts of each modality; empty without distillation."""
        return {m: self.distilled.of(m) for m in self.distilled.modalities} if self.distilled else {}


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
        only, without = ([of(m) for m in student.modalities] for of in (student.only, student.without))
        taught = [n for n, m in enumerate(student.modalities) if m in teachers]
        said = [teachers[student.modalities[n]] for n in taught]
        # Effects have no gradient: of three modalities or more, nobody differentiates the views without one.
        with student.constant({*without} - {*only}):
            output = student.step(ranking, [*only, *without], distillation, [only[n] for n in taught])
        joint = output.ranking[student.joint]
        if not taught:
            terms = {**output.loss_terms, "kd": joint.new_zeros(())}
            return ObjectiveOutput(torch.stack(list(terms.values())).sum(), terms, joint)

        alone = torch.stack([output.ranking[only[n]] for n in taught])
        with torch.no_grad():
            effects = causal_effects(joint, torch.stack([output.ranking[without[n]] for n in taught]), alone)
        asked = _masks([(one.asked_ranking, one.ranking) for one in said])
        asked_pairs = _masks([(one.asked_distillation, one.distillation) for one in said])
        if self.reweight and len(taught) > 1:
            weights = modality_weights(effects, asked)
        else:
            weights = torch.ones_like(effects) if asked is None else asked.to(effects.dtype)

        h = specific_loss(torch.stack([one.ranking for one in said]), alone)
        pairs = torch.stack([output.distillation[only[n]] for n in taught])
        g = generic_loss(torch.stack([one.distillation for one in said]), pairs, self.temperature, asked_pairs)
        parts = ([h] if self.specific else []) + ([self.kappa * g.unsqueeze(1)] if self.generic else [])
        per_sample = (weights * sum(parts)).sum(0) if parts else torch.zeros_like(joint)
        terms = {**output.loss_terms, "kd": self.rho * per_sample.mean()}
        distilled = DistillationTerms(tuple(student.modalities[n] for n in taught), alone, h, g, effects, weights, asked, asked_pairs)
        return ObjectiveOutput(torch.stack(list(terms.values())).sum(), terms, joint, per_sample, distilled)


def _masks(masks: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Masks of some modalities, each with what it is a mask of, as one: True where there is none. None where none has any."""
    if all(mask is None for mask, _ in masks):
        return None
    return torch.stack([torch.ones_like(like, dtype=torch.bool) if mask is None else mask for mask, like in masks])


@dataclass(frozen=True)
class PlainObjective:
    """A backbone's own loss alone: a teacher, or the plain student that distillation is compared with."""

    def __call__(self, backbone: Backbone, ranking: Triples) -> ObjectiveOutput:
        """Compute one step's loss; see :meth:`Backbone.losses`."""
        output = backbone.step(ranking)
        return ObjectiveOutput(torch.stack(list(output.loss_terms.values())).sum(), output.loss_terms, output.ranking[backbone.joint])
