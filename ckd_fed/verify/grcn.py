"""GRCN as MMRec and its authors compute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.grcn import GRCN, mean_squares
from ckd_fed.data.interactions import Interactions
from ckd_fed.verify.reference import Reference

_TOWERS = {"image": "v_gcn", "text": "t_gcn"}
_NAMES = {
    "id_embedding": "id_gcn.id_embedding",
    "confidence": "model_specific_conf",
    **{f"preference.{m}": f"{tower}.preference" for m, tower in _TOWERS.items()},
    **{f"projection.{m}.{part}": f"{tower}.MLP.{part}" for m, tower in _TOWERS.items() for part in ("weight", "bias")},
}


def check(ref: Reference) -> None:
    """Hold everything in the file against this implementation."""
    train = ref.interactions("inter/matrix")
    features = {m: ref.tensor(f"feat/{m}") for m in _TOWERS}
    triples = ref.triples("batch/user", "batch/pos", "batch/neg")

    def build(**options: Any) -> GRCN:
        options = {"n_routing": int(ref.number("hp/n_layers")), "pruning": bool(ref["hp/pruning"]), **options}
        model = GRCN(train, features, embedding_dim=ref[f"param/{_NAMES['id_embedding']}"].shape[1], l2=ref.number("hp/reg_weight"), **options)
        model = model.double()
        model.load_state_dict({ours: ref.tensor(f"param/{_NAMES[ours]}") for ours, _ in model.named_parameters()})
        return model

    def losses(model: GRCN) -> dict[str, Tensor]:
        return model.step(triples).loss_terms

    def compare(group: str, model: GRCN, prefix: str, view: frozenset[str] | None = None) -> None:
        view = model.joint if view is None else view
        users, items = model.embed([view])[view]
        ref.check(group, users, f"{prefix}/user")
        ref.check(group, items, f"{prefix}/item")
        if f"{prefix}/scores" in ref:
            ref.check(group, users @ items.T, f"{prefix}/scores")

    model = build()
    edges = ref["graph/edge_index"]
    order = edge_numbers(train, edges)
    ref.check("graph", torch.stack([model.edges.users[order], model.edges.items[order] + train.n_users]), "graph/edge_index")

    def both_ways(to_users: Tensor, to_items: Tensor) -> Tensor:
        """As the file lists edges: user to item, then item to user."""
        return torch.cat([to_items[order], to_users[order]])[:, None]

    present = [model._present(m) for m in model.modalities]
    for modality, tower in zip(model.modalities, ("v", "t"), strict=True):
        one = present[model.modalities.index(modality)]
        ref.check("intermediates", torch.cat(one.rows), f"mid/{tower}_rep")
        ref.check("intermediates", both_ways(one.at_users, one.at_items), f"mid/{tower}_alpha")
    ref.check("intermediates", both_ways(*model.weights(present)), "mid/edge_weight")
    tables = model.embed([model.joint])[model.joint]
    ref.check("intermediates", torch.cat(tables)[:, : model.embedding_dim], "mid/id_rep")
    compare("embeddings", model, "out")

    for source, regulariser in (("author", "authors"), ("mmrec", "mmrec")):
        trained = build(regulariser=regulariser)
        terms = losses(trained)
        total = terms["bpr"] + terms["l2"]
        ref.check("losses", total, f"loss/{source}_total")
        if source == "author":
            ref.check("losses", terms["bpr"], "loss/author_bpr")
            ref.check("losses", terms["l2"] / trained.l2, "loss/author_reg_unweighted")
            ids, preferences = mean_squares(triples, trained.id_embedding, trained.preference.values())
            ref.check("losses", ids, "loss/author_reg_id")
            ref.check("losses", preferences, "loss/author_reg_pref")
        total.backward()
        for ours, parameter in trained.named_parameters():
            assert parameter.grad is not None
            ref.check("gradients", parameter.grad, f"grad_{source}/{_NAMES[ours]}")

    for n in (0, 1):
        compare("options", build(n_routing=n), f"variant/n_layers{n}")
    for name, options in (
        ("soft", {"pruning": False}),
        ("weight_mean", {"weight_mode": "mean"}),
        ("weight_max", {"weight_mode": "max"}),
        ("fusion_id", {"fusion_mode": "id"}),
        ("paper_routing1", {"routing": "paper", "n_routing": 1}),
        ("paper_routing3", {"routing": "paper", "n_routing": 3}),
    ):
        variant = build(**options)
        compare("options", variant, f"variant/{name}")
        if f"variant/{name}/loss_author_total" in ref:
            terms = losses(variant)
            ref.check("options", terms["bpr"] + terms["l2"], f"variant/{name}/loss_author_total")
    for modality in model.modalities:
        compare("absent modality", model, f"cf/absent_{modality}", model.without(modality))


def edge_numbers(train: Interactions, edge_index: np.ndarray) -> np.ndarray:
    """Number in this implementation's order of every edge ``(user, n_users + item)`` of a file, ``(E,)``."""
    return np.searchsorted(train.keys, edge_index[0] * train.n_items + edge_index[1] - train.n_users)
