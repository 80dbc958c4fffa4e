"""MICRO as its authors' code computes it."""

from __future__ import annotations

from typing import Any

import torch

from ckd_fed.backbones.contrastive import catalogue_contrast
from ckd_fed.backbones.micro import MICRO
from ckd_fed.verify.item_graph import MODALITIES, batch, build, dense, gradients, parameter_names, variant, views
from ckd_fed.verify.reference import Reference


def check(ref: Reference) -> None:
    """Hold every number of the file against this implementation's."""
    names = {**parameter_names(), **{f"query.{part}": f"query.{part}" for part in ("0.weight", "0.bias", "2.weight")}}
    options: dict[str, Any] = {
        "embedding_dim": int(ref["hp/embedding_size"]),
        "l2": ref.number("hp/reg_weight"),
        "neighbours": int(ref["hp/topk"]),
        "frozen_share": ref.number("hp/lambda_coeff"),
        "n_item_layers": int(ref["hp/layers"]),
        "n_ui_layers": int(ref["hp/n_ui_layers"]),
        "contrastive_weight": ref.number("hp/loss_ratio"),
        "temperature": ref.number("hp/tau"),
        "collaborative": str(ref["hp/cf_model"]),
        "normalisation": str(ref["hp/norm_type"]),
    }
    model = build(MICRO, ref, names, **options)
    assert model.collaborative.propagate is not None
    ref.check("graphs", dense(model.collaborative.propagate), "graph/norm_adj")
    model.eval()
    identity = torch.eye(model.n_items, dtype=torch.float64)
    parts = model([model.joint]).parts
    for m, graph in model.item_graphs(MODALITIES).items():
        ref.check("graphs", dense(model.frozen(m)), f"graph/{m}_original_adj")
        ref.check("intermediates", graph @ identity, f"mid/{m}_adj")
        ref.check("intermediates", parts[f"content_{m}"], f"mid/{m}_item")
    ref.check("intermediates", parts["fused"], "mid/h")
    views(ref, model)

    contrasts = {m: catalogue_contrast(parts[f"content_{m}"], parts["fused"], model.temperature) for m in MODALITIES}
    for m, contrast in contrasts.items():
        ref.check("losses", contrast, f"loss/contrastive_{m}")
    ref.check("losses", torch.stack(list(contrasts.values())).sum(), "loss/contrastive_unweighted")
    model.train()
    model.start_epoch(0, torch.Generator())
    for prefix in ("grad", "grad_stale_graph"):
        model.zero_grad()
        terms = model.step(batch(ref)).loss_terms
        ref.check("losses", terms["bpr"], "loss/mf")
        ref.check("losses", terms["l2"], "loss/emb_weighted")
        total = torch.stack(list(terms.values())).sum()
        ref.check("losses", total, "loss/total")
        total.backward()
        gradients(ref, model, names, prefix)

    variant(ref, build(MICRO, ref, names, **{**options, "collaborative": "mf"}), "mf")
    variant(ref, build(MICRO, ref, names, **{**options, "n_item_layers": 2}), "layers2")
    variant(ref, build(MICRO, ref, names, **{**options, "normalisation": "rw"}), "norm_rw")
    variant(ref, build(MICRO, ref, names, "variant/drift/param", **options), "drift")
