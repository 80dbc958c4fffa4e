"""The objective of a distilled student's step: its own loss plus counterfactually weighted distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ckd_fed.backbones.base import Backbone, Triples, sum_of
from ckd_fed.distillation.distil import DistillationLoss, DistillationTerms, ModalityTerms, StudentMargins, TeacherMargins


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
class DistillationObjective(DistillationLoss):
    """CKD's objective for any number of modalities: the backbone's own loss, as published ``BPR + L2``, and ``L_kd``, whose settings are its own."""

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
        # Effects have no gradient: of three modalities or more, nobody differentiates the views without one.
        with student.constant({*without} - {*only}):
            output = student.step(ranking, [*only, *without], distillation, [only[n] for n in taught])
        joint = output.ranking[student.joint]
        if not taught:
            terms = {**output.loss_terms, "kd": joint.new_zeros(())}
            return ObjectiveOutput(sum_of(terms.values()), terms, joint)
        less, alone = ([output.ranking[views[n]] for n in taught] for views in (without, only))
        margins = StudentMargins(joint, less, alone, [output.distillation[only[n]] for n in taught])
        modalities = tuple(student.modalities[n] for n in taught)
        distilled = self.distil(modalities, margins, [teachers[m] for m in modalities])
        terms = {**output.loss_terms, "kd": distilled.loss}
        return ObjectiveOutput(sum_of(terms.values()), terms, joint, distilled.per_sample, distilled.terms)


@dataclass(frozen=True)
class PlainObjective:
    """A backbone's own loss alone: a teacher, or the plain student that distillation is compared with."""

    def __call__(self, backbone: Backbone, ranking: Triples) -> ObjectiveOutput:
        """Compute one step's loss; see :meth:`Backbone.losses`."""
        output = backbone.step(ranking)
        return ObjectiveOutput(sum_of(output.loss_terms.values()), output.loss_terms, output.ranking[backbone.joint])
