"""MGCN as its authors' code computes it."""

from __future__ import annotations

from typing import Any

import torch

from ckd_fed.backbones.contrastive import info_nce
from ckd_fed.backbones.mgcn import MGCN
from ckd_fed.verify.item_graph import MODALITIES, batch, build, dense, gradients, parameter_names, views
from ckd_fed.verify.reference import Reference

_GATE = {"image": "gate_v", "text": "gate_t"}


def check(ref: Reference) -> None:
    """Hold every number of the file against this implementation's."""
    names = {**parameter_names(), **{f"query.{part}": f"query_common.{part}" for part in ("0.weight", "0.bias", "2.weight")}}
    for m in MODALITIES:
        for part in ("weight", "bias"):
            names[f"gate.{m}.{part}"] = f"{_GATE[m]}.0.{part}"
            names[f"preference_gate.{m}.{part}"] = f"gate_{m}_prefer.0.{part}"
    options: dict[str, Any] = {
        "embedding_dim": int(ref["hp/embedding_size"]),
        "l2": ref.number("hp/reg_weight"),
        "neighbours": int(ref["hp/knn_k"]),
        "n_item_layers": int(ref["hp/n_layers"]),
        "n_ui_layers": int(ref["hp/n_ui_layers"]),
        "contrastive_weight": ref.number("hp/cl_loss"),
        "temperature": ref.number("hp/infonce_temperature"),
    }
    model = build(MGCN, ref, names, **options)
    ref.check("graphs", dense(model.propagate), "graph/norm_adj")
    ref.check("graphs", dense(model.to_users), "graph/R")
    for m in MODALITIES:
        ref.check("graphs", dense(model.item_graph[m]), f"graph/{m}_original_adj")
    views(ref, model)

    model.train()
    model.start_epoch(0, torch.Generator())
    parts, triples = model([model.joint]).parts, batch(ref)
    for ours, theirs in (("side", "side"), ("behaviour", "content")):
        ref.check("intermediates", torch.cat([parts[f"{ours}_users"], parts[f"{ours}_items"]]), f"mid/{theirs}")
    for kind, index in (("users", triples.users), ("items", triples.first)):
        ref.check("losses", info_nce(parts[f"side_{kind}"][index], parts[f"behaviour_{kind}"][index], model.temperature), f"loss/infonce_{kind}")
    terms = model.step(triples).loss_terms
    ref.check("losses", terms["bpr"], "loss/mf")
    ref.check("losses", terms["l2"], "loss/emb_weighted")
    total = torch.stack(list(terms.values())).sum()
    ref.check("losses", total, "loss/total")
    total.backward()
    gradients(ref, model, names)
