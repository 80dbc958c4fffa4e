r"""LATTICE: an item graph learned from all modalities, mined for latent structures.

Zhang, Zhu, Liu, Wu, Wang, Wang. "Mining Latent Structures for Multimedia Recommendation". ACM MM 2021, arXiv:2104.09036.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Embeddings, Pass, View
from ckd_fed.backbones.collaborative import Collaborative
from ckd_fed.backbones.item_graph import ConstantGraph, ItemGraphBackbone, Neighbours, inverse, nearest, share, total, union
from ckd_fed.data.interactions import Interactions


class LATTICE(ItemGraphBackbone):
    r"""LightGCN over users and items, plus the item IDs propagated over one graph that all modalities make up together.

    .. math::
        e_u = \mathrm{LGN}(u), \quad e_i = \mathrm{LGN}(i) + \frac{h_i}{|h_i|}, \quad h = S^L t, \quad
        S = (1-\lambda)\,\mathrm{sym}\Big(\sum_m a_m S^1_m\Big) + \lambda \sum_m a_m\,\mathrm{sym}(S^0_m)

    S^0_m are the k nearest items by features (frozen), S^1_m those by :math:`W_m e_m + b_m` (learned), both weighted by cosine similarity;
    a = softmax of one trained number a modality; :math:`\mathrm{sym}(S) = D^{-1/2} S D^{-1/2}`; t the item ID embedding.

    As published, the learned graph is built with gradient for the first training batch of an epoch (after :meth:`start_epoch`) and kept
    without gradient for the others, so W, b, e_m and a get a gradient once an epoch. Evaluation builds it anew.

    An absent modality's graph is uniform: S^1_m is k/N everywhere, sym(S^0_m) is 1/N. Both are of rank one and never written out. The same
    holds of the row of an item that lacks the modality, before the learned graphs' sum is normalised: that divides by the neighbours' degrees
    too, which differ where the modality is absent for all, and so the row of S differs a little from that of the view without the modality
    (in FREEDOM, MICRO and MGCN nothing differs). Users are the same in every view.

    The sums run over any number of modalities. MMRec's and the authors' code agree; Elliot's differs (diagonals set to 1, other
    normalisations) and is not followed. The published learning rate decays by 0.96 every 50 epochs; here it is constant. There, as ``zero_grad``
    was in 2021, W, b, e_m and a have gradients of zero in all batches of an epoch but the first, so Adam's momentum moves them on through the
    epoch; here they have none, and Adam passes them over until the next epoch.

    Args:
        train, features, present, l2: see :class:`~ckd_fed.backbones.base.Backbone`; L2 is on the final embeddings.
        embedding_dim: width d of all embeddings.
        neighbours: k, the nearest items that an item is joined to in each modality.
        frozen_share: share lambda of the graph of the raw features, at most 1; the learned graph has the rest.
        n_item_layers: layers L over the item graph.
        n_ui_layers: layers of the user-item part.
        collaborative: what the user-item part is, ``lightgcn``, ``ngcf`` or ``mf``.

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
        l2: float = 1e-5,
        neighbours: int = 10,
        frozen_share: float = 0.9,
        n_item_layers: int = 1,
        n_ui_layers: int = 2,
        collaborative: str = "lightgcn",
    ) -> None:
        super().__init__(train, features, present, embedding_dim=embedding_dim, l2=l2)
        self.neighbours, self.frozen_share, self.n_item_layers = min(neighbours, self.n_items), share("frozen_share", frozen_share), n_item_layers
        self.modal_weight = nn.Parameter(torch.empty(len(self.modalities)))
        self.collaborative = Collaborative(collaborative, train, embedding_dim, n_ui_layers, next(iter(features.values())).dtype)
        self.freeze_graphs(neighbours)
        self._learned: Learned | None = None
        self._kept: dict[View, ItemGraph] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal weights of the modalities; the rest as :meth:`ItemGraphBackbone.reset_parameters`."""
        super().reset_parameters()
        nn.init.constant_(self.modal_weight, 0.5)

    @property
    def dense_work(self) -> float:
        return float(self.n_items**2 * self.item_embedding.shape[1] * len(self.modalities))  # of a learned graph

    @property
    def epoch_parameters(self) -> frozenset[str]:
        """Those of the learned graph."""
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(("drift.", "projection.")) or name == "modal_weight")

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Forget the learned graph: the next training batch builds it."""
        self._learned, self._kept = None, {}

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables; users and the collaborative part of items are those of every view."""
        users, items = self.collaborative(self.user_embedding, self.item_embedding)
        graphs = self.item_graphs(views)
        tables = {}
        for view, graph in graphs.items():
            with self.gradient(view):
                tables[view] = Embeddings(users, items + F.normalize(self._propagated(graph), dim=-1))
        return Pass(tables)

    def item_graphs(self, views: Sequence[View]) -> dict[View, ItemGraph]:
        """S of every view: with gradient where it is built, the kept one where it is not."""
        if not (self.training and torch.is_grad_enabled()):
            learned = self.learn([m for m in self.modalities if any(m in view for view in views)])
            return {view: self._graph(view, learned) for view in views}
        if self._learned is None:
            learned = self.learn(self.modalities)
            self._learned = Learned(learned.share.detach(), {m: graph.detach() for m, graph in learned.graphs.items()})
            return {view: self._graph(view, learned) for view in views}
        for view in views:
            if view not in self._kept:
                self._kept[view] = self._graph(view, self._learned).constant()
        return {view: self._kept[view] for view in views}

    def learn(self, modalities: Sequence[str]) -> Learned:
        """The learned neighbours of some modalities, and the shares a of all."""
        graphs = {m: nearest(self.projection[m](self.trained_features(m)), self.neighbours, self.present(m)) for m in modalities}
        return Learned(self.modal_weight.softmax(0), graphs)

    def _propagated(self, graph: ItemGraph) -> Tensor:
        h: Tensor = self.item_embedding
        for _ in range(self.n_item_layers):
            h = graph @ h
        return h

    def _graph(self, view: View, learned: Learned) -> ItemGraph:
        shares = dict(zip(self.modalities, learned.share, strict=True))
        present = [m for m in self.modalities if m in view]
        missing = total([learned.share.new_zeros(1, 1), *(a * self._lacking(m, m in view) for m, a in shares.items())])  # (1 or n_items, 1)
        mixed = union([learned.graphs[m].scaled(shares[m]) for m in present]) if present else None
        degree = (0 if mixed is None else mixed.row_sum().unsqueeze(1)) + (missing * self.neighbours).expand(self.n_items, 1)
        root = inverse(degree, 0.5)  # (n_items, 1)
        new, old = 1 - self.frozen_share, self.frozen_share
        near = None
        if mixed is not None:
            normed = Neighbours(mixed.index, new * root * mixed.weight * root.squeeze(1)[mixed.index])
            near = union([normed, *(self.frozen(m).scaled(old * shares[m]) for m in present)])
        if len(present) == len(self.modalities) and not self.incomplete:
            return ItemGraph(near)
        return ItemGraph(near, root, new * missing * self.neighbours / self.n_items, old * missing)

    def _lacking(self, modality: str, in_view: bool) -> Tensor | float:
        """1 where an item is without the modality in a view, 0 where it has it: a number for all, or ``(n_items, 1)``."""
        present = self.present(modality)
        if not in_view:
            return 1.0
        return 0.0 if present is None else (~present).unsqueeze(1).to(self.modal_weight.dtype)


class Learned(NamedTuple):
    """What an epoch keeps: the shares a ``(n_modalities,)`` and the learned neighbours, modality by modality."""

    share: Tensor
    graphs: dict[str, Neighbours]


class ItemGraph(NamedTuple):
    r"""S of one view: a sparse part, and what absent modalities add, :math:`c\,r\,r^T + \frac{q}{N} 1^T`, where there are any.

    Attributes:
        near: the sparse part; None where no modality is present.
        root: r, ``(n_items, 1)``; None where none is absent.
        spread, uniform: c (times each row) and q, the same for all items ``(1, 1)`` or by item ``(n_items, 1)``.
    """

    near: Neighbours | ConstantGraph | None
    root: Tensor | None = None
    spread: Tensor | float = 0.0
    uniform: Tensor | float = 0.0

    def __matmul__(self, x: Tensor) -> Tensor:
        """S @ x, ``(n_items, d)``."""
        if self.root is None:
            assert self.near is not None
            return self.near @ x
        ones = self.root * (self.spread * (self.root * x).sum(0)) + self.uniform * x.mean(0)
        return ones if self.near is None else self.near @ x + ones

    def constant(self) -> ItemGraph:
        """The same graph, detached and prepared for many products; of constant neighbours."""
        return self._replace(near=self.near.constant() if isinstance(self.near, Neighbours) else self.near)
