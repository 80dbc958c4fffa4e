r"""FREEDOM: frozen item graphs beside a denoised user-item graph.

Zhou, Shen. "A Tale of Two Graphs: Freezing and Denoising Graph Structures for Multimodal Recommendation". ACM MM 2023, arXiv:2211.06924.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Embeddings, Pass, RankingBatch, View, bpr_loss
from ckd_fed.backbones.gather import margin
from ckd_fed.backbones.graph import Csr, Propagation, constant_product, light_gcn, symmetric_normalised_adjacency
from ckd_fed.backbones.item_graph import ItemGraphBackbone, Neighbours, share, total
from ckd_fed.data.interactions import Interactions

EPSILON = 1e-7  # added to every degree, of users and items and of the item graphs


class FREEDOM(ItemGraphBackbone):
    r"""LightGCN over users and items, plus the item IDs averaged over each item's nearest neighbours.

    .. math:: e_u = \mathrm{LGN}(u), \quad e_i = \mathrm{LGN}(i) + h_i, \quad h = S^L t, \quad S = \sum_m w_m S_m

    S_m is the binary graph of the k nearest items by features (1/k each, directed, frozen), t the item ID embedding. Features enter
    the scores through S alone; their projection :math:`f_m = W_m e_m + b_m` is trained by a BPR term of its own,

    .. math:: L = \mathrm{BPR}(u, i, j) + \alpha \sum_m \mathrm{BPR}(u, f_m[i], f_m[j])

    where the mean of a modality's term runs over the triples of which both items have it.

    In training the user-item graph is pruned: :meth:`start_epoch` keeps :math:`\lfloor E(1-\rho)\rfloor` of its edges, drawn without
    replacement with probabilities proportional to :math:`1/\sqrt{d_u d_i}`, and normalises anew. Evaluation uses all edges.

    An absent modality's graph is uniform, so it adds :math:`w_m` times the mean of all items' embeddings to every item. Users are the same in
    every view.

    The published model has two modalities with w and 1 - w; here any number, see ``image_weight``. It has no L2 term. A teacher's loss
    has its own modality's f_m. The published implementations (authors', MMRec) do not differ.

    Args:
        train, features, present: see :class:`~ckd_fed.backbones.base.Backbone`.
        embedding_dim: width d of all embeddings.
        l2: weight of an L2 term on the batch's embeddings; 0 as published.
        neighbours: k, the nearest items that an item is joined to in each modality.
        image_weight: weight of the modality named ``image``, or of the first one where none has that name; the others share the rest
            equally. A single modality's weight is 1.
        n_item_layers: layers L over the item graph.
        n_ui_layers: layers of LightGCN over the user-item graph.
        edge_dropout: share rho, below 1, of the user-item edges that an epoch leaves out.
        modality_weight: weight alpha of the modalities' own BPR terms.

    Shapes:
        embeddings ``(n, embedding_dim)``.
    """

    def __init__(
        self,
        train: Interactions,
        features: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
        *,
        embedding_dim: int = 64,
        l2: float = 0.0,
        neighbours: int = 10,
        image_weight: float = 0.1,
        n_item_layers: int = 1,
        n_ui_layers: int = 2,
        edge_dropout: float = 0.8,
        modality_weight: float = 1e-3,
    ) -> None:
        super().__init__(train, features, present, embedding_dim=embedding_dim, l2=l2)
        self.n_item_layers, self.n_ui_layers = n_item_layers, n_ui_layers
        self.edge_dropout, self.modality_weight = share("edge_dropout", edge_dropout), modality_weight
        self.weight = mixing_weights(self.modalities, share("image_weight", image_weight))
        dtype = next(iter(features.values())).dtype
        graphs = {m: binary_graph(self.nearest(m, neighbours), self.present(m)) for m in features}
        self.item_graph = nn.ModuleDict({m: Propagation(graph.to_scipy(), dtype) for m, graph in graphs.items()})
        self.propagate = Propagation(symmetric_normalised_adjacency(train, EPSILON), dtype)
        self.edges = Edges(train)
        self._pruned: Csr | None = None
        self.static_steps = not self.incomplete  # else the losses pick the triples whose items have a modality
        self.reset_parameters()

    @property
    def dense_work(self) -> float:
        return float(sum(self.features(m).numel() for m in self.modalities) * self.item_embedding.shape[1])

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the edges that the epoch trains on."""
        self.prune(self.edges.draw(self.edge_dropout, generator) if self.edge_dropout else None)

    def prune(self, keep: Tensor | None) -> None:
        """Train on some of the edges, ``(n_edges,)`` bool in the order of the training interactions; None for all."""
        self._pruned = None if keep is None else self.edges.adjacency(keep.to(self.item_embedding.device), self.item_embedding.dtype)

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables; users and the items' LightGCN embeddings are those of every view."""
        both = light_gcn(self._over_edges, torch.cat([self.user_embedding, self.item_embedding]), self.n_ui_layers)
        users, items = both.split([self.n_users, self.n_items])
        return Pass({view: Embeddings(users, items + h) for view, h in self.item_part(views).items()})

    def item_part(self, views: Sequence[View]) -> dict[View, Tensor]:
        """h of every view, ``(n_items, d)``."""
        h: dict[View, Tensor] = dict.fromkeys(views, self.item_embedding)
        for _ in range(self.n_item_layers):
            done: dict[tuple[str, int], Tensor] = {}  # a product is made once: in the first layer all views have the same input
            h = {view: self._mixed(view, x, done) for view, x in h.items()}
        return h

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """BPR of the scores, and of every modality's projected features over the triples of which both items have it; L2 where it is asked for."""
        terms = {"bpr": bpr_loss(batch.margin)}
        for m in self.modalities:
            (_, first, second), users, present = batch.triples, batch.users, self.present(m)
            if present is not None:
                both = present[first] & present[second]
                first, second, users = first[both], second[both], users[both]
            rows = self._projected(m, torch.cat([first, second])).split([len(first), len(second)])
            terms[f"bpr_{m}"] = self.modality_weight * bpr_loss(margin(users, *rows))
        if self.l2:
            terms["l2"] = self.l2 * batch.half_squares()
        return terms

    def _projected(self, modality: str, items: Tensor) -> Tensor:
        """f_m of some items, ``(len(items), d)``: of the rows asked for or of the catalogue, whichever is fewer."""
        linear = self.projection[modality]
        if len(items) < self.n_items:
            return linear(F.embedding(items, self.features(modality)) + F.embedding(items, self.drift[modality]))
        return F.embedding(items, linear(self.trained_features(modality)))

    def _over_edges(self, x: Tensor) -> Tensor:
        if self.training and self._pruned is not None:
            return constant_product(x, self._pruned, self._pruned)
        return self.propagate(x)

    def _mixed(self, view: View, x: Tensor, done: dict[tuple[str, int], Tensor]) -> Tensor:
        """S x of a view, ``(n_items, d)``; an absent modality gives every item the mean row."""
        parts = []
        for m in self.modalities:
            key = (m if m in view else "", id(x))
            if key not in done:
                done[key] = self.spread(m, self.item_graph[m](x), x) if m in view else x.mean(0)
            parts.append(self.weight[m] * done[key])
        return total(parts).expand_as(x)


class Edges(nn.Module):
    """The user-item edges, sorted by user and by item once, so that the adjacency of some of them needs no sorting.

    Args:
        train: training interactions; edges are counted in their order.
    """

    def __init__(self, train: Interactions) -> None:
        super().__init__()
        self.n_users, self.n_items = train.n_users, train.n_items
        by_item = np.argsort(train.items, kind="stable")
        self.register_buffer("users", torch.from_numpy(train.row), persistent=False)
        self.register_buffer("items", torch.from_numpy(train.items), persistent=False)
        self.register_buffer("by_item", torch.from_numpy(by_item), persistent=False)
        degrees = train.degree[train.row], np.bincount(train.items, minlength=train.n_items)[train.items]
        #: 1 / sqrt(d_u d_i) of every edge, on the CPU like the generators it is drawn with.
        self.importance = torch.from_numpy(1 / np.sqrt((degrees[0] + EPSILON) * (degrees[1] + EPSILON)))

    def draw(self, dropout: float, generator: torch.Generator) -> Tensor:
        """Keep floor(E (1 - dropout)) edges without replacement, with probabilities proportional to their importance.

        The first of exponential clocks that run at these rates: the law of successive draws (``torch.multinomial``, which the published
        code calls), without its bound on the number of edges.

        Returns:
            ``(n_edges,)`` bool, on the CPU.
        """
        n = len(self.importance)
        clocks = torch.empty(n, dtype=torch.float64).exponential_(generator=generator) / self.importance
        keep = torch.zeros(n, dtype=torch.bool)
        keep[clocks.topk(kept_edges(n, dropout), largest=False, sorted=False).indices] = True
        return keep

    def adjacency(self, keep: Tensor, dtype: torch.dtype) -> Csr:
        """D^-1/2 A D^-1/2 of the kept edges in compressed-row form, ``(n_users + n_items)`` squared; it is its own transpose.

        Args:
            keep: ``(n_edges,)`` bool.
            dtype: of the values.
        """
        by_user, by_item = (self.get_buffer(name) for name in ("users", "by_item"))
        items = self.get_buffer("items")
        of_users, of_items = keep, keep[by_item]
        users_of, items_of = by_user[of_users], items[of_users]  # ascending by user
        back = by_item[of_items]  # ascending by item
        degree_u = torch.zeros(self.n_users, dtype=torch.long, device=keep.device).index_add_(0, users_of, torch.ones_like(users_of))
        degree_i = torch.zeros(self.n_items, dtype=torch.long, device=keep.device).index_add_(0, items_of, torch.ones_like(items_of))
        root_u, root_i = ((degree.double() + EPSILON).rsqrt() for degree in (degree_u, degree_i))
        values = torch.cat([root_u[users_of] * root_i[items_of], root_u[by_user[back]] * root_i[items[back]]]).to(dtype)
        columns = torch.cat([items_of + self.n_users, by_user[back]])
        at = torch.cat([torch.zeros(1, dtype=torch.long, device=keep.device), torch.cat([degree_u, degree_i]).cumsum(0)])
        n = self.n_users + self.n_items
        return Csr(at, columns, values, (n, n))


def kept_edges(n: int, dropout: float) -> int:
    """floor(E (1 - rho)), computed as the published code does."""
    return int(n * (1 - dropout))


def binary_graph(graph: Neighbours, present: Tensor | None = None) -> Neighbours:
    """S_m: every one of the k nearest items weighs the same, 1 / (k + epsilon); nothing in the rows of items that are not present."""
    weight = torch.full(graph.index.shape, 1 / (graph.index.shape[1] + EPSILON), dtype=torch.float64)
    return Neighbours(graph.index, weight if present is None else weight * present.cpu().unsqueeze(1))


def mixing_weights(modalities: Sequence[str], image_weight: float) -> dict[str, float]:
    """w_m: ``image_weight`` for ``image`` (or the first modality where none has that name), the rest shared equally by the others."""
    if len(modalities) == 1:
        return {modalities[0]: 1.0}
    image = "image" if "image" in modalities else modalities[0]
    rest = (1 - image_weight) / (len(modalities) - 1)
    return {m: image_weight if m == image else rest for m in modalities}
