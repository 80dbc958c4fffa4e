"""BM3 as MMRec (and its authors, whose source is the same) computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ckd_fed.backbones.bm3 import BM3
from ckd_fed.backbones.graph import symmetric_normalised_adjacency
from ckd_fed.verify.reference import Reference

_MODALITIES = ("image", "text")
_NAMES = {
    "user_embedding": "user_embedding.weight",
    "item_embedding": "item_id_embedding.weight",
    **{f"predictor.{part}": f"predictor.{part}" for part in ("weight", "bias")},
    **{f"projection.{m}.{part}": f"{m}_trs.{part}" for m in _MODALITIES for part in ("weight", "bias")},
    **{f"drift.{m}": f"{m}_embedding.weight" for m in _MODALITIES},
}


class _Masked(BM3):
    """BM3 with the reference's dropout masks."""

    masks: dict[str, Tensor]

    def _keep(self, table: str, index: Tensor, rows: Tensor, size: int) -> Tensor:
        return self.masks[table][index]


def check(ref: Reference) -> None:
    """Hold everything in the file against this implementation."""
    train = ref.interactions("inter/matrix")
    features = {m: ref.tensor(f"feat/{m}") for m in _MODALITIES}
    triples = ref.triples("batch/user", "batch/pos", "batch/neg")

    def build(kind: type[BM3] = BM3, **options: float) -> BM3:
        settings = {"n_layers": int(ref.number("hp/n_layers")), "dropout": ref.number("hp/dropout"), **options}
        model = kind(
            train,
            features,
            embedding_dim=ref["param/user_embedding.weight"].shape[1],
            l2=ref.number("hp/reg_weight"),
            contrastive_weight=ref.number("hp/cl_weight"),
            **settings,  # type: ignore[arg-type]
        ).double()
        state = {ours: ref.tensor(f"param/{theirs}") for ours, theirs in _NAMES.items()}
        for m, matrix in features.items():  # the published table is features and drift in one
            state[f"drift.{m}"] -= matrix
        model.load_state_dict(state)
        return model

    model = build()
    ref.check("graph", symmetric_normalised_adjacency(train, 1e-7).toarray(), "graph/norm_adj")
    done = model([model.joint])
    ref.check("embeddings", done.parts["users"], "mid/user_online_pre_predictor")
    ref.check("embeddings", done.parts["items"], "mid/item_online_pre_predictor")
    for view in (model.joint, *map(model.without, _MODALITIES)):  # every view is the same
        users, items = model.embed([view])[view]
        ref.check("embeddings", users, "out/user")
        ref.check("embeddings", items, "out/item")
        ref.check("embeddings", users @ items.T, "out/scores")

    terms = model.step(triples).loss_terms
    total = torch.stack(list(terms.values())).sum()
    ref.check("losses", total, "loss/total")
    ref.check("losses", terms["reconstruction"], "loss/graph_reconstruction")
    ref.check("losses", terms["alignment"] / model.contrastive_weight, "loss/modality_alignment_unweighted")
    ref.check("losses", terms["l2"] / model.l2, "loss/reg_unweighted")
    total.backward()
    for ours, parameter in model.named_parameters():
        assert parameter.grad is not None
        ref.check("gradients", parameter.grad, f"grad/{_NAMES[ours]}")

    masked = build(_Masked, dropout=ref.number("variant/dropout/p"))
    assert isinstance(masked, _Masked)
    masked.masks = {table: ref.tensor(f"variant/dropout/keep_{table}") for table in ("user", "item", *_MODALITIES)}
    ref.check("options", torch.stack(list(masked.step(triples).loss_terms.values())).sum(), "variant/dropout/loss_total")
    ref.checked.update(ref.names("variant/dropout/"))  # the rest of that variant is its inputs
    shallow = build(n_layers=1)
    users, items = shallow.embed([shallow.joint])[shallow.joint]
    ref.check("options", users, "variant/n_layers1/user")
    ref.check("options", items, "variant/n_layers1/item")
