"""LATTICE as MMRec's and its authors' code compute it."""

from __future__ import annotations

from typing import Any

import torch

from ckd_fed.backbones.lattice import LATTICE
from ckd_fed.verify.item_graph import MODALITIES, batch, build, dense, gradients, parameter_names, variant, views
from ckd_fed.verify.reference import Reference


def check(ref: Reference) -> None:
    """Hold every number of the file against this implementation's."""
    names = {**parameter_names(), "modal_weight": "modal_weight"}
    options: dict[str, Any] = {
        "embedding_dim": int(ref["hp/embedding_size"]),
        "l2": ref.number("hp/reg_weight"),
        "neighbours": int(ref["hp/knn_k"]),
        "frozen_share": ref.number("hp/lambda_coeff"),
        "n_item_layers": int(ref["hp/n_layers"]),
        "n_ui_layers": int(ref["hp/n_ui_layers"]),
        "collaborative": str(ref["hp/cf_model"]),
    }
    model = build(LATTICE, ref, names, **options)
    assert model.collaborative.propagate is not None
    ref.check("graphs", dense(model.collaborative.propagate), "graph/norm_adj")
    with torch.no_grad():
        learned = model.learn(model.modalities)
    for m in MODALITIES:
        ref.check("graphs", dense(model.frozen(m)), f"graph/{m}_original_adj")
        ref.check("intermediates", dense(learned.graphs[m]), f"mid/{m}_learned_knn")
    identity = torch.eye(model.n_items, dtype=torch.float64)
    ref.check("intermediates", model.eval().item_graphs([model.joint])[model.joint] @ identity, "mid/item_adj")
    views(ref, model)

    model.train()
    model.start_epoch(0, torch.Generator())
    terms = model.step(batch(ref)).loss_terms
    ref.check("losses", terms["bpr"], "loss/mf")
    ref.check("losses", terms["l2"], "loss/emb_weighted")
    total = torch.stack(list(terms.values())).sum()
    ref.check("losses", total, "loss/total")
    if "loss/author_total" in ref:
        ref.check("losses", total, "loss/author_total")
    total.backward()
    gradients(ref, model, names)
    model.zero_grad()
    total = torch.stack(list(model.step(batch(ref)).loss_terms.values())).sum()
    ref.check("losses", total, "loss/total_second_batch_same_params")
    total.backward()
    gradients(ref, model, names, "grad_stale_graph")

    variant(ref, build(LATTICE, ref, names, **{**options, "collaborative": "mf"}), "mf")
    variant(ref, build(LATTICE, ref, names, **{**options, "n_item_layers": 2}), "n_layers2")
    variant(ref, build(LATTICE, ref, names, "variant/drift/param", **options), "drift")
    deep = dict(names)
    for layer in range(options["n_ui_layers"]):
        for ours, theirs in (("linear", "GC_Linear_list"), ("product", "Bi_Linear_list")):
            for part in ("weight", "bias"):
                deep[f"collaborative.{ours}.{layer}.{part}"] = f"{theirs}.{layer}.{part}"
    variant(ref, build(LATTICE, ref, deep, "variant/ngcf/param", **{**options, "collaborative": "ngcf"}), "ngcf")
