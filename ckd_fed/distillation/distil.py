"""The distillation loss of a step, from margins: by one compiled kernel, or of torch's operations where that is not to be had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckd_fed.distillation.effects import causal_effects, modality_weights
from ckd_fed.distillation.losses import generic_loss, specific_loss
from ckd_fed.kernels import Kernels, kernels


@dataclass(frozen=True)
class StudentMargins:
    """What a student makes of one step's triples, of M modalities that have a teacher.

    Attributes:
        joint: of the joint view, ``(B,)``; read without gradient.
        without: of each ``without m``, ``(B,)`` each; read without gradient.
        only: of each ``only m``, ``(B,)`` each.
        pairs: those of the distillation batch, ``(K,)`` each.
    """

    joint: Tensor
    without: Sequence[Tensor]
    only: Sequence[Tensor]
    pairs: Sequence[Tensor]


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


@dataclass(frozen=True)
class Distilled:
    """The distillation loss of a step, and what it is made of.

    Attributes:
        loss: ``L_kd``, scalar, with gradient for the margins of ``only m``.
        per_sample: what it is rho times the mean of, ``(B,)``, without gradient.
        terms: its parts, without gradient.
    """

    loss: Tensor
    per_sample: Tensor
    terms: DistillationTerms


@dataclass(frozen=True)
class DistillationLoss:
    """CKD's distillation loss for any number of modalities.

    ``L_kd = rho * mean_n sum_m w_m[n] * (h_m[n] + kappa * g_m)``

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

    def distil(self, modalities: tuple[str, ...], student: StudentMargins, teachers: Sequence[TeacherMargins]) -> Distilled:
        """The loss from what student and teachers say.

        Args:
            modalities: those with a teacher, at least one.
            student: margins, in their order.
            teachers: margins, in their order.
        """
        said = [tensor for one in teachers for tensor in (one.ranking, one.distillation)]
        compiled = _compiled([student.joint, *student.without, *student.only, *student.pairs, *said])
        if compiled is None:
            return self.composed(modalities, student, teachers)
        loss, per_sample, margin, h, effect, weight, g = _Distil.apply(self, compiled, student, teachers, *student.only, *student.pairs)
        masks = _all_masks(teachers)
        return Distilled(loss, per_sample, DistillationTerms(modalities, margin, h, g, effect, weight, *masks))

    def composed(self, modalities: tuple[str, ...], student: StudentMargins, teachers: Sequence[TeacherMargins]) -> Distilled:
        """What :meth:`distil` gives, of torch's own operations."""
        alone, pairs = torch.stack(list(student.only)), torch.stack(list(student.pairs))
        with torch.no_grad():
            effects = causal_effects(student.joint, torch.stack(list(student.without)), alone)
        asked, asked_pairs = _all_masks(teachers)
        if self.reweight and len(modalities) > 1:
            weights = modality_weights(effects, asked)
        else:
            weights = torch.ones_like(effects) if asked is None else asked.to(effects.dtype)
        h = specific_loss(torch.stack([one.ranking for one in teachers]), alone)
        g = generic_loss(torch.stack([one.distillation for one in teachers]), pairs, self.temperature, asked_pairs)
        parts = ([h] if self.specific else []) + ([self.kappa * g.unsqueeze(1)] if self.generic else [])
        per_sample = (weights * sum(parts)).sum(0) if parts else torch.zeros_like(student.joint)
        terms = DistillationTerms(modalities, alone.detach(), h.detach(), g.detach(), effects, weights, asked, asked_pairs)
        return Distilled(self.rho * per_sample.mean(), per_sample.detach(), terms)


def _all_masks(teachers: Sequence[TeacherMargins]) -> tuple[Tensor | None, Tensor | None]:
    return _masks([(one.asked_ranking, one.ranking) for one in teachers]), _masks([(one.asked_distillation, one.distillation) for one in teachers])


def _masks(masks: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Masks of some modalities, each with what it is a mask of, as one: True where there is none. None where none has any."""
    if all(mask is None for mask, _ in masks):
        return None
    return torch.stack([torch.ones_like(like, dtype=torch.bool) if mask is None else mask for mask, like in masks])


def _compiled(margins: Sequence[Tensor]) -> Kernels | None:
    """The kernels, where they are for these."""
    fit = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() for tensor in margins)
    return kernels() if fit else None


class _Distil(torch.autograd.Function):
    """One operation with its derivatives by the margins of ``only m``."""

    @staticmethod
    def forward(
        ctx: Any, loss: DistillationLoss, compiled: Kernels, student: StudentMargins, teachers: Sequence[TeacherMargins], *only: Tensor
    ) -> tuple[Tensor, ...]:
        def each(tensors: Iterable[Tensor]) -> list[Tensor]:
            return [tensor.contiguous() for tensor in tensors]

        def masks(of: Iterable[Tensor | None]) -> list[Tensor | None]:
            return [mask if mask is None else mask.contiguous() for mask in of]

        samples = each(student.without), each(student.only), each(one.ranking for one in teachers)
        pairs = each(student.pairs), each(one.distillation for one in teachers)
        asked = masks(one.asked_ranking for one in teachers), masks(one.asked_distillation for one in teachers)
        strengths, switches = (loss.rho, loss.kappa, loss.temperature), (loss.reweight, loss.specific, loss.generic)
        kd, *parts, slopes = compiled.distil(student.joint.contiguous(), samples, pairs, asked, strengths, switches)
        ctx.sizes, ctx.slopes = list(map(len, only)), slopes
        ctx.mark_non_differentiable(*parts)
        ctx.set_materialize_grads(False)  # of the parts, which have none
        return kd, *parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, kd: Tensor, *parts: None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(ctx.slopes * kd).split(ctx.sizes)
