"""FREEDOM as its authors' code computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ckd_fed.backbones.freedom import FREEDOM, kept_edges
from ckd_fed.verify.item_graph import MODALITIES, batch, build, dense, gradients, parameter_names, variant, views
from ckd_fed.verify.reference import Reference


def check(ref: Reference) -> None:
    """Hold every number of the file against this implementation's."""
    names = parameter_names()
    options: dict[str, Any] = {
        "embedding_dim": int(ref["hp/embedding_size"]),
        "neighbours": int(ref["hp/knn_k"]),
        "image_weight": ref.number("hp/mm_image_weight"),
        "n_item_layers": int(ref["hp/n_mm_layers"]),
        "n_ui_layers": int(ref["hp/n_ui_layers"]),
        "edge_dropout": ref.number("hp/dropout"),
        "modality_weight": ref.number("hp/reg_weight"),
    }
    model = build(FREEDOM, ref, names, **options)
    _check_edges(ref, model)
    ref.check("graphs", dense(model.propagate), "graph/norm_adj")
    for m in MODALITIES:
        ref.check("graphs", dense(model.item_graph[m]), f"graph/{m}_adj")
    ref.check("graphs", sum(model.weight[m] * dense(model.item_graph[m]) for m in MODALITIES), "graph/mm_adj")
    views(ref, model)

    model.train()
    model.start_epoch(0, torch.Generator())
    terms = model.step(batch(ref)).loss_terms
    ref.check("losses", terms["bpr"], "loss/bpr")
    for m in MODALITIES:
        ref.check("losses", terms[f"bpr_{m}"] / model.modality_weight, f"loss/bpr_{m}_unweighted")
    total = torch.stack(list(terms.values())).sum()
    ref.check("losses", total, "loss/total")
    total.backward()
    gradients(ref, model, names)

    edges, kept = ref["inter/edges"], ref["variant/pruned/kept_edge_positions"]
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    if len(kept) != kept_edges(len(edges), ref.number("variant/pruned/dropout")):
        raise ValueError(f"variant/pruned/kept_edge_positions has {len(kept)} edges")
    ref.checked |= {"variant/pruned/dropout", "variant/pruned/kept_edge_positions"}
    model.prune(torch.from_numpy(np.isin(np.arange(len(edges)), kept)[order]))
    users, items = model.embed([model.joint])[model.joint]
    ref.check("variant pruned", users, "variant/pruned/user")
    ref.check("variant pruned", items, "variant/pruned/item")
    ref.check("variant pruned", model._over_edges(torch.eye(len(users) + len(items), dtype=torch.float64)), "variant/pruned/masked_adj")
    ref.check("variant pruned", torch.stack(list(model.step(batch(ref)).loss_terms.values())).sum(), "variant/pruned/loss_total")

    deeper = build(FREEDOM, ref, names, **{**options, "n_item_layers": 2})
    variant(ref, deeper, "n_mm_layers2")


def _check_edges(ref: Reference, model: FREEDOM) -> None:
    """The edges in the file's order, and the weights that pruning draws by."""
    edges = ref["inter/edges"]
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    back = np.argsort(order)
    ours = torch.stack([model.edges.get_buffer("users"), model.edges.get_buffer("items")])[:, back]
    ref.check("graphs", ours, "graph/edge_indices")
    ref.check("graphs", model.edges.importance[back], "graph/edge_values")
