"""One distillation step of CKD (VBPR or MMGCN) as the authors' published code computes it."""

from __future__ import annotations

import torch

from ckd_fed.backbones.base import Backbone
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.graph import row_normalised_adjacency
from ckd_fed.distillation.distil import TeacherMargins
from ckd_fed.distillation.objective import DistillationObjective, PlainObjective
from ckd_fed.verify.reference import Reference

_MODALITIES = ("image", "text")
_BRANCH = {"image": "v_gcn", "text": "t_gcn"}


def parameter_names(backbone: str) -> dict[str, str]:
    """This implementation's parameter names -> those of the reference files."""
    names = {"user_embedding": "user_embedding.weight", "item_embedding": "item_embedding.weight"}
    for m in _MODALITIES:
        names[f"preference.{m}"] = f"user_{m}_preference.weight"
        for part in ("weight", "bias"):
            names[f"projection.{m}.{part}"] = f"{m}_trs.{part}"
            if backbone == "mmgcn":
                for layer in range(3):
                    for ours, theirs in (("conv", "conv_embed_"), ("linear", "linear_layer"), ("gate", "g_layer")):
                        names[f"branch.{m}.{ours}.{layer}.{part}"] = f"{_BRANCH[m]}.{theirs}{layer + 1}.{part}"
    return names


def check(ref: Reference) -> None:
    """Hold every number of the step against this implementation's."""
    name = "mmgcn" if "student.v_gcn.conv_embed_1.weight" in ref else "vbpr"
    train = ref.interactions("input.interactions")
    features = {m: ref[f"input.{m}_feats"] for m in _MODALITIES}
    decay = ref.number("const.decay")
    names = parameter_names(name)

    def load(role: str) -> Backbone:
        dim = ref[f"{role}.user_embedding.weight"].shape[1]
        backbone = build_backbone(name, train, features, {"embedding_dim": dim, "l2": decay}, seed=0, dtype=torch.float64)
        backbone.load_state_dict({ours: torch.from_numpy(ref[f"{role}.{theirs}"]) for ours, theirs in names.items()})
        return backbone

    if name == "mmgcn":
        adjacency = row_normalised_adjacency(train).toarray()
        ref.check("adjacency", adjacency, "input.adj_row_normalised_with_self_loops")
    student, teachers = load("student"), {m: load(f"{m}_teacher") for m in _MODALITIES}
    ranking = ref.triples("input.users", "input.pos_items", "input.neg_items")
    pairs = ref.triples("input.kd_users", "input.kd_items_j", "input.kd_items_k")

    views = {"joint": student.joint, **{f"{m}_only": student.only(m) for m in _MODALITIES}}
    tables = student.embed(list(views.values()))
    for label, view in views.items():
        ref.check(f"embeddings {label}", tables[view].users, f"{label}.user_emb")
        ref.check(f"embeddings {label}", tables[view].items, f"{label}.item_emb")

    margins = {}
    for m, teacher in teachers.items():
        only = [teacher.only(m)]
        said = teacher.step(ranking, only, pairs, only)
        margins[m] = TeacherMargins(said.ranking[only[0]].detach(), said.distillation[only[0]].detach())
        ref.check("teacher margins", margins[m].ranking, f"out.teacher_margin_{m}")
        ref.check("teacher margins", margins[m].distillation, f"out.generic_teacher_margin_{m}")

    objective = DistillationObjective(rho=ref.number("const.kd_ratio"), kappa=ref.number("const.kl"), temperature=ref.number("const.pred_temp"))
    out = objective(student, ranking, pairs, margins)
    ref.check("margins", out.joint_margin, "out.margin_joint")
    for m, part in out.modalities.items():
        ref.check("margins", part.margin, f"out.margin_{m}_only")
        ref.check("specific loss", part.specific, f"out.specific_{m}")
        ref.check("generic loss", part.generic, f"out.generic_{m}")
        ref.check("effects", part.effect, f"out.effect_{m}")
        ref.check("weights", part.weight, f"out.weight_{m}")
    generic = student.step(ranking, [], pairs, [student.only(m) for m in _MODALITIES]).distillation
    for m in _MODALITIES:
        ref.check("margins", generic[student.only(m)], f"out.generic_margin_{m}_only")
    ref.check("BPR", torch.nn.functional.softplus(-out.joint_margin), "out.bpr_per_sample")
    ref.check("BPR", out.terms["bpr"], "out.bpr")
    ref.check("L2", out.terms["l2"], "out.l2")
    assert out.per_sample is not None
    ref.check("distillation", out.per_sample * objective.rho, "out.kd_per_sample")
    ref.check("distillation", out.terms["kd"], "out.kd")
    ref.check("total", out.loss, "out.loss")

    out.loss.backward()
    for ours, parameter in student.named_parameters():
        if f"grad.{names[ours]}" not in ref:
            # MMGCN's preferences are constants in the published code; here they are Parameters.
            if name == "mmgcn" and ours.startswith("preference."):
                continue
            raise KeyError(f"grad.{names[ours]}")
        assert parameter.grad is not None
        ref.check("gradients", parameter.grad, f"grad.{names[ours]}")

    own = _OnlyView(teachers["text"], "text")
    plain = PlainObjective()(own, ranking)
    ref.check("text teacher's loss", plain.terms["bpr"], "out.text_teacher_bpr")
    ref.check("text teacher's loss", plain.terms["l2"], "out.text_teacher_l2")


class _OnlyView(Backbone):
    """A teacher as published: the full backbone, trained on its ``only m`` view (here a teacher never needs the other features)."""

    def __init__(self, backbone: Backbone, modality: str) -> None:
        torch.nn.Module.__init__(self)
        self.backbone, self.l2, self.modalities, self.modality = backbone, backbone.l2, (modality,), modality

    def forward(self, views):  # type: ignore[no-untyped-def]
        return self.backbone(views)

    def reset_parameters(self) -> None:
        self.backbone.reset_parameters()
