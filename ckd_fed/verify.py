"""Recompute every number of a published reference file with this implementation, in float64.

A reference file holds inputs, parameters and every intermediate and final number of one distillation step as the authors' code
computes it (``tests/reference/README.md`` gives the layout). Sizes and seeds may be any.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.graph import row_normalised_adjacency
from ckd_fed.data.interactions import Interactions
from ckd_fed.distillation.objective import DistillationObjective, PlainObjective, TeacherMargins
from ckd_fed.errors import DataError

TOLERANCE = 1e-9
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


def verify(path: Path) -> dict[str, float]:
    """Largest relative error of each group of numbers.

    The error of an array is the largest absolute difference divided by the largest magnitude in the reference array.

    Returns:
        Group (for example ``"embeddings joint"``, ``"gradients"``) -> error; NaN counts as infinite.

    Raises:
        DataError: the file is missing, unreadable, or lacks a number of the layout.
    """
    reference = _read(path)
    try:
        return _verify(reference)
    except KeyError as error:
        raise DataError(f"{path} lacks {error.args[0]!r}; it is not a reference file of the layout in tests/reference/README.md") from None
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise DataError(f"{path} is inconsistent: {' '.join(str(error).split())}") from None


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive (a single array?)")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib each raise their own types
        raise DataError(f"{path} cannot be read as an .npz archive: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _verify(ref: Mapping[str, np.ndarray]) -> dict[str, float]:
    name = "mmgcn" if "student.v_gcn.conv_embed_1.weight" in ref else "vbpr"
    rows, columns = np.nonzero(ref["input.interactions"])
    train = Interactions.from_pairs(rows, columns, *ref["input.interactions"].shape)
    features = {m: ref[f"input.{m}_feats"] for m in _MODALITIES}
    decay = float(ref["const.decay"])
    names = parameter_names(name)

    def load(role: str) -> Backbone:
        dim = ref[f"{role}.user_embedding.weight"].shape[1]
        backbone = build_backbone(name, train, features, {"embedding_dim": dim, "l2": decay}, seed=0, dtype=torch.float64)
        backbone.load_state_dict({ours: torch.from_numpy(ref[f"{role}.{theirs}"]) for ours, theirs in names.items()})
        return backbone

    def tensor(key: str) -> Tensor:
        return torch.from_numpy(ref[f"input.{key}"].astype(np.int64))

    errors: dict[str, float] = {}

    def check(group: str, ours: Tensor, theirs: str) -> None:
        errors[group] = max(errors.get(group, 0.0), relative_error(ours.detach().numpy(), ref[theirs]))

    if name == "mmgcn":
        adjacency = row_normalised_adjacency(train).toarray()
        errors["adjacency"] = relative_error(adjacency, ref["input.adj_row_normalised_with_self_loops"])
    student, teachers = load("student"), {m: load(f"{m}_teacher") for m in _MODALITIES}
    ranking = Triples(tensor("users"), tensor("pos_items"), tensor("neg_items"))
    pairs = Triples(tensor("kd_users"), tensor("kd_items_j"), tensor("kd_items_k"))

    views = {"joint": student.joint, **{f"{m}_only": student.only(m) for m in _MODALITIES}}
    tables = student.embed(list(views.values()))
    for label, view in views.items():
        check(f"embeddings {label}", tables[view].users, f"{label}.user_emb")
        check(f"embeddings {label}", tables[view].items, f"{label}.item_emb")

    margins = {}
    for m, teacher in teachers.items():
        only = [teacher.only(m)]
        said = teacher.step(ranking, only, pairs, only)
        margins[m] = TeacherMargins(said.ranking[only[0]].detach(), said.distillation[only[0]].detach())
        check("teacher margins", margins[m].ranking, f"out.teacher_margin_{m}")
        check("teacher margins", margins[m].distillation, f"out.generic_teacher_margin_{m}")

    objective = DistillationObjective(rho=float(ref["const.kd_ratio"]), kappa=float(ref["const.kl"]), temperature=float(ref["const.pred_temp"]))
    out = objective(student, ranking, pairs, margins)
    check("margins", out.joint_margin, "out.margin_joint")
    for m, part in out.modalities.items():
        check("margins", part.margin, f"out.margin_{m}_only")
        check("specific loss", part.specific, f"out.specific_{m}")
        check("generic loss", part.generic, f"out.generic_{m}")
        check("effects", part.effect, f"out.effect_{m}")
        check("weights", part.weight, f"out.weight_{m}")
    generic = student.step(ranking, [], pairs, [student.only(m) for m in _MODALITIES]).distillation
    for m in _MODALITIES:
        check("margins", generic[student.only(m)], f"out.generic_margin_{m}_only")
    check("BPR", torch.nn.functional.softplus(-out.joint_margin), "out.bpr_per_sample")
    check("BPR", out.terms["bpr"], "out.bpr")
    check("L2", out.terms["l2"], "out.l2")
    assert out.per_sample is not None
    check("distillation", out.per_sample * objective.rho, "out.kd_per_sample")
    check("distillation", out.terms["kd"], "out.kd")
    check("total", out.loss, "out.loss")

    out.loss.backward()
    for ours, parameter in student.named_parameters():
        if f"grad.{names[ours]}" not in ref:
            # MMGCN's preferences are constants in the published code; here they are Parameters.
            if name == "mmgcn" and ours.startswith("preference."):
                continue
            raise KeyError(f"grad.{names[ours]}")
        assert parameter.grad is not None
        check("gradients", parameter.grad, f"grad.{names[ours]}")

    own = _OnlyView(teachers["text"], "text")
    plain = PlainObjective()(own, ranking)
    check("text teacher's loss", plain.terms["bpr"], "out.text_teacher_bpr")
    check("text teacher's loss", plain.terms["l2"], "out.text_teacher_l2")
    return errors


class _OnlyView(Backbone):
    """A teacher as published: the full backbone, trained on its ``only m`` view (here a teacher never needs the other features)."""

    def __init__(self, backbone: Backbone, modality: str) -> None:
        torch.nn.Module.__init__(self)
        self.backbone, self.l2, self.modalities, self.modality = backbone, backbone.l2, (modality,), modality

    def forward(self, views):  # type: ignore[no-untyped-def]
        return self.backbone(views)

    def reset_parameters(self) -> None:
        self.backbone.reset_parameters()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|ours - theirs| / max|theirs|; infinite for different shapes or a NaN on either side."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float(np.abs(ours - theirs).max(initial=0.0))
    scale = float(np.abs(theirs).max(initial=0.0))
    error = difference / scale if scale > 0 else difference
    return error if np.isfinite(error) else float("inf")


def report(path: Path, write: Callable[[str], None]) -> bool:
    """Verify one file, write a line per group, and say whether all errors are under :data:`TOLERANCE`."""
    errors = verify(path)
    write(f"{path}")
    for group, error in errors.items():
        write(f"  {group:<24} {error:10.2e}  {'ok' if error < TOLERANCE else 'TOO LARGE'}")
    passed = all(error < TOLERANCE for error in errors.values())
    write(f"  {'all under' if passed else 'NOT all under'} {TOLERANCE:.0e}")
    return passed
