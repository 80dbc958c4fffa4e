"""EgoGCN as its authors compute it (three modalities), and the two-modality form derived from it."""

from __future__ import annotations

from typing import Any

import torch

from ckd_fed.backbones.base import View
from ckd_fed.backbones.egogcn import EgoGCN
from ckd_fed.backbones.grcn import mean_squares
from ckd_fed.verify.grcn import edge_numbers
from ckd_fed.verify.reference import Reference

# The published towers with what they hear through fcy and fcz, in the published order.
_TOWERS = {"image": ("v", "third", "text"), "third": ("a", "image", "text"), "text": ("t", "third", "image")}
_THRESHOLD = "hp/hard_threshold"


def _names(ref: Reference, modalities: list[str]) -> dict[str, str]:
    """This implementation's parameter names -> the file's."""
    names = {"id_embedding": "id_gcn_real.id_embedding"}
    for m in modalities:
        tower, *heard = _TOWERS[m]
        published = "param/preferencev" in ref
        names[f"preference.{m}"] = f"preference{tower}" if published else f"preference_{m}"
        for part in ("weight", "bias"):
            names[f"projection.{m}.{part}"] = f"MLP{tower}.{part}" if published else f"MLP_{m}.{part}"
            for gate, other in zip(("fcy", "fcz"), heard, strict=True):
                if other in modalities:
                    theirs = f"{tower}_gcn.conv_embed_11.{gate}" if published else f"{m}_tower.gate_from_{other}"
                    names[f"gate.{m}.{other}.{part}"] = f"{theirs}.{part}"
    return names


def check(ref: Reference) -> None:
    """Hold everything in the file against this implementation."""
    train = ref.interactions("inter/matrix")
    modalities = [m for m in _TOWERS if f"feat/{m}" in ref]
    names = _names(ref, modalities)
    triples = ref.triples("batch/user", "batch/pos", "batch/neg")
    order = edge_numbers(train, ref["graph/edge_index"])

    def build(**options: Any) -> EgoGCN:
        options = {"n_routing": int(ref.number("hp/num_routing")), "threshold": ref.number(_THRESHOLD), "reattention": True, **options}
        features = {m: ref.tensor(f"feat/{m}") for m in modalities}
        model = EgoGCN(train, features, embedding_dim=int(ref.number("hp/dim_E")), l2=ref.number("hp/reg_weight"), **options).double()
        model.load_state_dict({ours: ref.tensor(f"param/{names[ours]}") for ours, _ in model.named_parameters()})
        return model

    def compare(group: str, model: EgoGCN, prefix: str, view: View | None = None) -> None:
        view = model.joint if view is None else view
        users, items = model.embed([view])[view]
        for ours, name in ((users, "user"), (items, "item"), (users @ items.T, "scores")):
            if name != "scores" or f"{prefix}/scores" in ref:
                ref.check(group, ours, f"{prefix}/{name}")

    def intermediates(group: str, model: EgoGCN, prefix: str) -> None:
        """Of a model that has been through a forward in training, so that its preferences are projected."""
        if f"{prefix}id_rep" not in ref:
            return
        inputs = {(m, True): model._input(m, True) for m in modalities}
        gated = {} if model.fusion == "hard" else model._gated(inputs)
        ref.check(group, torch.cat(model._id_tower()), f"{prefix}id_rep")
        for m in modalities:
            received, at_users, at_items = model.first_layer(m, model.joint, inputs, gated)
            tower = _TOWERS[m][0]
            ref.check(group, torch.cat(received), f"{prefix}{tower}_fused")
            ref.check(group, torch.cat([at_items[order], at_users[order]]), f"{prefix}{tower}_alpha")  # user to item first
            ref.check(group, torch.cat(model.route(received)), f"{prefix}{tower}_rep")

    def losses(group: str, model: EgoGCN, prefix: str) -> torch.Tensor:
        terms = model.step(triples).loss_terms
        ids, preferences = mean_squares(triples, model.id_embedding, model.preference.values())
        total = terms["bpr"] + terms["l2"]
        for ours, name in ((total, "total"), (terms["bpr"], "bpr"), (ids, "reg_id"), (preferences, "reg_pref")):
            if f"{prefix}{name}" in ref:
                ref.check(group, ours, f"{prefix}{name}")
        return total

    model = build()
    edges = torch.stack([model.edges.users[order], model.edges.items[order] + train.n_users])
    ref.check("graph", edges, "graph/edge_index")
    compare("embeddings", build().eval(), "out")  # normalises a copy
    compare("embeddings", model, "out")  # normalises in place
    intermediates("intermediates", model, "mid/")
    losses("losses", model, "loss/").backward()
    for ours, parameter in model.named_parameters():
        if ref.names("grad/"):  # the derived file has none
            assert parameter.grad is not None
            ref.check("gradients", parameter.grad, f"grad/{names[ours]}")
        if f"param_after_forward/{names[ours]}" in ref:
            ref.check("projection", parameter, f"param_after_forward/{names[ours]}")

    for name, options in (
        ("soft", {"reattention": False}),
        ("hard", {"fusion": "hard", "reattention": False}),
        ("hard_reattn", {"fusion": "hard"}),
        ("num_routing1", {"n_routing": 1}),
    ):
        if f"variant/{name}/user" in ref:
            variant = build(**options)
            compare("options", variant, f"variant/{name}")
            intermediates("options", variant, f"variant/{name}/mid/")
            losses("options", variant, f"variant/{name}/loss_")

    for absent in modalities:
        view = model.without(absent)
        if f"cf_normed_pref/absent_{absent}/user" in ref:
            compare("absent modality", build(), f"cf_normed_pref/absent_{absent}", view)
        # The other form, the mean of preferences that were never projected: put into the table, it is every user's row.
        averaged = build()
        table = averaged.preference[absent]
        with torch.no_grad():
            table.copy_(table.mean(0).expand_as(table))
        compare("absent modality", averaged, f"cf/absent_{absent}", view)
