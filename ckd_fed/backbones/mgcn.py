r"""MGCN: purified modality features over item graphs, fused by attention on both sides.

Yu, Tan, Lu, Bao. "Multi-View Graph Convolutional Network for Multimedia Recommendation". ACM MM 2023, arXiv:2308.03588.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Asked, Embeddings, Pass, RankingBatch, StepOutput, Triples, View
from ckd_fed.backbones.contrastive import checked_temperature, info_nce
from ckd_fed.backbones.graph import Propagation, light_gcn, symmetric_normalised_adjacency
from ckd_fed.backbones.inverted import compacted
from ckd_fed.backbones.item_graph import ItemGraphBackbone, normalise, total
from ckd_fed.data.interactions import Interactions

State = tuple[str, bool]  # a modality, present or absent


class MGCN(ItemGraphBackbone):
    r"""LightGCN over users and items, plus what the modalities have in common and what is special in each, gated by behaviour.

    .. math::
        c = \mathrm{LGN}([u; t]), \quad x_m = S_m^L \big(t \circ \sigma(G_m f_m)\big), \quad f_m = W_m e_m + b_m, \quad Z_m = [R\,x_m; x_m]

    .. math::
        o = \sum_m \alpha_m Z_m, \quad s = \frac{1}{|M| + 1}\Big(\sum_m \sigma(G'_m c) \circ (Z_m - o) + o\Big), \quad e = c + s

    S_m are the k nearest items by features, weighted by cosine similarity, normalised and frozen; R is the user-item block of the
    symmetrically normalised adjacency; :math:`\alpha = \mathrm{softmax}_m\, w \cdot \tanh(W Z_m + b)`, row by row of users and items; G_m and G'_m
    are linear maps with bias. The loss is BPR, L2 and

    .. math:: \gamma\,\big(\mathrm{InfoNCE}(s_i, c_i) + \mathrm{InfoNCE}(s_u, c_u)\big)

    over the batch's positive items and its users (:func:`~ckd_fed.backbones.contrastive.info_nce`).

    An absent modality's S_m is uniform (1/N) and its e_m the mean, so x_m is the mean item embedding behind one gate, the same for every
    item, those that lack the modality among them where it is present; users get R times that. Attention and gates are computed from it.
    Users differ from view to view.

    The published model has two modalities and divides by three; here by the number of modalities and one. With a single modality
    o = Z_m, so the attention and G' have no effect and s = Z_m / 2. There is one published implementation, the authors' (also in MMRec).

    Args:
        train, features, present, l2: see :class:`~ckd_fed.backbones.base.Backbone`; L2 is on the final embeddings.
        embedding_dim: width d of all embeddings.
        neighbours: k, the nearest items that an item is joined to in each modality.
        n_item_layers: layers L over the item graphs.
        n_ui_layers: layers of LightGCN over the user-item graph.
        contrastive_weight: weight gamma of the contrast of content with behaviour.
        temperature: of InfoNCE, above 0.

    Shapes:
        embeddings ``(n, embedding_dim)``.
    """

    static_steps = True

    def __init__(
        self,
        train: Interactions,
        features: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
        *,
        embedding_dim: int = 64,
        l2: float = 1e-4,
        neighbours: int = 10,
        n_item_layers: int = 1,
        n_ui_layers: int = 2,
        contrastive_weight: float = 0.01,
        temperature: float = 0.2,
    ) -> None:
        super().__init__(train, features, present, embedding_dim=embedding_dim, l2=l2)
        self.n_item_layers, self.n_ui_layers = n_item_layers, n_ui_layers
        self.contrastive_weight, self.temperature = contrastive_weight, checked_temperature(temperature)
        self.query = nn.Sequential(nn.Linear(embedding_dim, embedding_dim), nn.Tanh(), nn.Linear(embedding_dim, 1, bias=False))
        self.gate = nn.ModuleDict({m: nn.Linear(embedding_dim, embedding_dim) for m in self.modalities})
        self.preference_gate = nn.ModuleDict({m: nn.Linear(embedding_dim, embedding_dim) for m in self.modalities})
        dtype = next(iter(features.values())).dtype
        adjacency = symmetric_normalised_adjacency(train)
        self.propagate = Propagation(adjacency, dtype)
        to_users = adjacency[: self.n_users, self.n_users :]
        self.to_users = Propagation(to_users, dtype)
        share = np.concatenate([np.asarray(to_users.sum(axis=1)).ravel(), np.ones(self.n_items)])  # of a row that all items have
        self.register_buffer("share", torch.from_numpy(share[:, None]).to(dtype), persistent=False)
        self.item_graph = nn.ModuleDict({m: Propagation(normalise(self.nearest(m, neighbours)).to_scipy(), dtype) for m in features})
        self.reset_parameters()

    @property
    def dense_work(self) -> float:
        d = self.item_embedding.shape[1]
        return float(sum(self.features(m).numel() * d + (3 * self.n_users + 4 * self.n_items) * d * d for m in self.modalities))

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables; ``parts`` are c and s of the joint view."""
        return self._pass(views, self.n_users)

    def compute_step(self, asked: Asked) -> StepOutput:
        """As :meth:`Backbone.compute_step`; what follows the graphs is row by row, and on a CPU only the rows of the batches are computed."""
        if asked.ranking.users.device.type != "cpu":  # the host would have to wait to know which rows these are
            return super().compute_step(asked)
        batches = [asked.ranking] if asked.distillation is None else [asked.ranking, asked.distillation]
        users, of_users = compacted([batch.users for batch in batches])
        items, of_items = compacted([torch.stack([batch.first, batch.second]) for batch in batches])
        done = self._pass(asked.views, len(users), torch.cat([users, items + self.n_users]))
        local = [Triples(mine, *both) for mine, both in zip(of_users, of_items, strict=True)]
        return self.read(done, replace(asked, ranking=local[0], distillation=local[1] if len(local) > 1 else None))

    def _pass(self, views: Sequence[View], n_users: int, nodes: Tensor | None = None) -> Pass:
        """Tables of some nodes, n_users users and then items; of all nodes where None is given."""
        behaviour = light_gcn(self.propagate, torch.cat([self.user_embedding, self.item_embedding]), self.n_ui_layers)
        behaviour = behaviour if nodes is None else behaviour.index_select(0, nodes)
        tables, parts = {}, {}
        for view, side in self._sides(views, behaviour, self.contents(views, nodes)).items():
            tables[view] = Embeddings(*_split(behaviour + side, n_users))
            if view == self.joint:
                for name, table in (("side", side), ("behaviour", behaviour)):
                    parts[f"{name}_users"], parts[f"{name}_items"] = _split(table, n_users)
        return Pass(tables, parts)

    def _sides(self, views: Sequence[View], behaviour: Tensor, contents: Mapping[State, Tensor]) -> dict[View, Tensor]:
        """s of every view from rows of c and Z_m, ``(n, d)`` each."""
        if len(self.modalities) == 1:  # o is the content and what is special is 0
            (m,) = self.modalities
            return {view: contents[m, m in view] / 2 for view in views}
        scores = {key: self.query(z) for key, z in contents.items()}  # (n, 1)
        gates = {m: self.preference_gate[m](behaviour).sigmoid() for m in self.modalities}
        sides = {}
        for view in views:
            with self.gradient(view):
                shares = torch.cat([scores[m, m in view] for m in self.modalities], 1).softmax(1).split(1, dim=1)
                seen = {m: contents[m, m in view] for m in self.modalities}
                common = total(a * seen[m] for m, a in zip(self.modalities, shares, strict=True))
                special = total(gates[m] * (seen[m] - common) for m in self.modalities)
                sides[view] = (special + common) / (len(self.modalities) + 1)
        return sides

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """BPR, L2, and the side of the batch's users and positive items against their behaviour."""
        pairs = []
        for kind, index in (("users", batch.triples.users), ("items", batch.triples.first)):
            side, behaviour = (F.embedding(index, batch.parts[f"{name}_{kind}"]) for name in ("side", "behaviour"))
            pairs.append(info_nce(side, behaviour, self.temperature))
        return {**super().losses(batch), "contrastive": self.contrastive_weight * torch.stack(pairs).sum()}

    def contents(self, views: Sequence[View], nodes: Tensor | None = None) -> dict[State, Tensor]:
        """Z_m of every modality as the views need it, of some nodes or of all, ``(n, d)`` each."""
        share = self.get_buffer("share") if nodes is None else self.get_buffer("share").index_select(0, nodes)
        found = {}
        for m in self.modalities:
            gate, projected = self.gate[m], self.projection[m](self.trained_features(m))  # f_m, (n_items, d)
            # The mean of f_m is f_m of the mean.
            absent = self.item_embedding.mean(0) * gate(self.having(m, projected).mean(0, keepdim=True)).sigmoid()  # (1, d)
            if wanted(views, m, True):
                x = self.item_embedding * gate(projected).sigmoid()
                for _ in range(self.n_item_layers):
                    x = self.spread(m, self.item_graph[m](x), absent)
                z = torch.cat([self.to_users(x), x])
                found[m, True] = z if nodes is None else z.index_select(0, nodes)
            if wanted(views, m, False):
                found[m, False] = share * absent
        return found


def wanted(views: Sequence[View], modality: str, present: bool) -> bool:
    """Whether some view has the modality present, or absent."""
    return any((modality in view) is present for view in views)


def _split(table: Tensor, n_users: int) -> tuple[Tensor, Tensor]:
    """Users and items, as torch.split gives them: their gradients are joined by one concatenation."""
    users, items = table.split([n_users, len(table) - n_users])
    return users, items
