"""What the reference files of FREEDOM, LATTICE, MICRO and MGCN have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Triples
from ckd_fed.backbones.graph import Propagation
from ckd_fed.backbones.item_graph import Neighbours
from ckd_fed.verify.reference import Reference

MODALITIES = ("image", "text")
_GROUPS = {"grad": "gradients", "grad_stale_graph": "gradients, kept graph"}
Kind = TypeVar("Kind", bound=Backbone)


def parameter_names() -> dict[str, str]:
    """This implementation's parameter names -> those of the files, for the parameters that all four models have."""
    names = {"user_embedding": "user_embedding.weight", "item_embedding": "item_id_embedding.weight"}
    for m in MODALITIES:
        names[f"drift.{m}"] = f"{m}_embedding.weight"
        for part in ("weight", "bias"):
            names[f"projection.{m}.{part}"] = f"{m}_trs.{part}"
    return names


def build(kind: type[Kind], ref: Reference, names: Mapping[str, str], prefix: str = "param", **options: Any) -> Kind:
    """A backbone with the file's features and parameters, in float64.

    The file's feature tables e_m are the features plus our drift.

    Args:
        kind: the backbone's class.
        ref: the file.
        names: our parameter names -> the file's.
        prefix: where in the file the parameters are.
        options: of the backbone.
    """
    features = {m: ref.tensor(f"feat/{m}") for m in MODALITIES}
    model = kind(ref.interactions("inter/matrix"), features, **options).double()
    state = {ours: ref.tensor(f"{prefix}/{theirs}") for ours, theirs in names.items()}
    for m in MODALITIES:
        state[f"drift.{m}"] = state[f"drift.{m}"] - features[m]
    model.load_state_dict(state)
    # Parameters of a reference's variant are part of what was read, not numbers to be recomputed.
    ref.checked |= {name for name in ref.names("variant/") if "/param/" in name}
    return model


def batch(ref: Reference) -> Triples:
    """The file's batch of triples."""
    return ref.triples("batch/user", "batch/pos", "batch/neg")


def views(ref: Reference, model: Backbone) -> None:
    """Embeddings and scores of the joint view, and the views with a modality absent."""
    model.eval()
    absent = {m: model.without(m) for m in MODALITIES}
    tables = model.embed([model.joint, *absent.values()])
    users, items = tables[model.joint]
    ref.check("embeddings", users, "out/user")
    ref.check("embeddings", items, "out/item")
    ref.check("scores", users @ items.T, "out/scores")
    for m, view in absent.items():
        ref.check("absent modality", tables[view].users, f"cf/absent_{m}/user")
        ref.check("absent modality", tables[view].items, f"cf/absent_{m}/item")


def gradients(ref: Reference, model: Backbone, names: Mapping[str, str], prefix: str = "grad") -> None:
    """Gradients of every parameter; one that the file leaves out has none.

    A gradient that is zero by construction (FREEDOM's bias cancels in a margin) is rounding noise in the file and here: it is held
    against the largest gradient of the file.
    """
    largest = max(float(abs(ref[name]).max()) for name in ref.names(f"{prefix}/"))
    for ours, parameter in model.named_parameters():
        name = f"{prefix}/{names[ours]}"
        ours_there = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name not in ref:
            error = float(ours_there.abs().max()) / largest
        elif float(abs(ref[name]).max()) > 1e-12 * largest:
            ref.check(_GROUPS[prefix], ours_there, name)
            continue
        else:
            ref.checked.add(name)
            error = float((ours_there - ref.tensor(name)).abs().max()) / largest
        ref.errors[_GROUPS[prefix]] = max(ref.errors.get(_GROUPS[prefix], 0.0), error)


def variant(ref: Reference, model: Backbone, name: str) -> None:
    """Embeddings of one of the file's variants."""
    users, items = model.eval().embed([model.joint])[model.joint]
    ref.check(f"variant {name}", users, f"variant/{name}/user")
    ref.check(f"variant {name}", items, f"variant/{name}/item")


def dense(graph: Propagation | Neighbours | torch.nn.Module) -> Tensor:
    """A graph as a matrix."""
    size = graph.shape[1] if isinstance(graph, Propagation) else len(graph.index)  # type: ignore[union-attr,arg-type]
    identity = torch.eye(size, dtype=torch.float64)
    return graph @ identity if isinstance(graph, Neighbours) else graph(identity)
