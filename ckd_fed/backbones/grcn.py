r"""GRCN: graph-refined convolution, where the modalities decide how much each edge of the user-item graph counts.

Wei, Wang, Nie, He, Chua. "Graph-Refined Convolutional Network for Multimedia Recommendation with Implicit Feedback". ACM MM 2020,
doi 10.1145/3394171.3413556, arXiv:2111.02036.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.attention import BipartiteEdges, unit_rows
from ckd_fed.backbones.base import Embeddings, RankingBatch, Triples, View, bpr_loss
from ckd_fed.backbones.blocks import BlockBackbone
from ckd_fed.backbones.projection import project
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError, unknown


def mean_squares(triples: Triples, ids: Tensor, preferences: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The authors' regularisers: mean squares of a batch's ID embeddings and, summed over modalities, of its users' preferences.

    Args:
        triples: the ranking batch; positives and negatives count half as much each as the users do.
        ids: ``(n_users + n_items, d)``.
        preferences: ``(n_users, d)`` each.
    """
    users, first, second = triples
    tables = list(preferences)
    n, n_users = len(triples), tables[0].shape[0]
    of_users, of_items = F.embedding(torch.cat([users, first + n_users, second + n_users]), ids).square().split([n, 2 * n])
    return of_users.mean() + of_items.mean(), torch.stack([F.embedding(users, table).square().mean() for table in tables]).sum()


class Affinity(NamedTuple):
    """One modality, present or absent: its representations r_m, and alpha of messages to users and to items, ``(E,)`` each."""

    rows: Embeddings
    at_users: Tensor
    at_items: Tensor


class GRCN(BlockBackbone):
    r"""Modalities refine the graph on which the ID embeddings are propagated, and stand beside them in the end.

    Per modality m, with n() the normalisation of rows to unit norm and phi the leaky ReLU (slope 0.01),

    .. math::
        P = n(\text{preference}_m), \quad F = n(\phi(W_m f_m + b_m)), \quad X = [P; F], \quad
        \alpha_m(j \to t) = \mathrm{softmax}_{j \in N(t)}(X_j \cdot X_t), \quad r_m = X + \sum_j \alpha_m X_j .

    An edge weighs :math:`w(j \to t) = \max_m \alpha_m(j \to t)\, c_{j,m}` with a learned confidence c of each node (the one that sends)
    in each modality: one column a modality, so a teacher has one. Hard pruning cuts negative weights off, soft pruning leaves them. Then

    .. math:: x = n(e_{id}), \quad r_{id} = x + A_w x + A_w^2 x, \quad e = [r_{id} \,|\, r_1 \,|\, r_2 \,|\dots] .

    The loss is BPR plus :math:`\lambda\,(\overline{e_{id}[u]^2 + e_{id}[i]^2} + \sum_m \overline{\text{preference}_m[u]^2})`, where a bar
    is the mean over entries and i runs over positives and negatives.

    Where implementations disagree
        - *Routing.* In the paper a user's preference gathers what the user's items are like,
          :math:`P \leftarrow n(P + \sum_i \alpha F_i)`, some times before the rest. The authors' code and MMRec hand the layer edges that
          end at items and read its user rows, which are zero: the number of routings has no effect. ``routing="published"`` is what they
          compute, ``"paper"`` what the paper describes.
        - *Regulariser.* MMRec adds the mean square of all users' preferences for the first modality (it knows the visual one):
          ``regulariser="mmrec"``. It also draws W_m Xavier-normal; here torch's default is drawn, as the authors do.
        - *Pruning* is hard in the authors' parser default and soft in the commands of their README.

    An absent modality has equal rows, so alpha is 1/degree of the target and its representations are two rows; it still competes in
    the maximum, with the confidences as they are.

    Args:
        train, features: see :class:`~ckd_fed.backbones.base.Backbone`; the training interactions are the graph.
        l2: weight lambda of the regulariser.
        embedding_dim: width of each block; there is one for IDs and one a modality.
        routing: ``published`` (none, as the published code computes it) or ``paper`` (preferences gather what the user's items are like).
        n_routing: how many times under ``paper``.
        pruning: hard (true: negative edge weights are cut off) or soft (false).
        weight_mode: of an edge: ``confid`` (largest attention times confidence), or ``mean`` or ``max`` of the attentions without confidences.
        fusion_mode: ``concat`` (all blocks side by side), or ``id``, which scores with the ID block alone.
        regulariser: ``authors`` or ``mmrec``, which adds the first modality's preferences of all users.

    Shapes:
        embeddings ``(n, (1 + number of modalities) * embedding_dim)``, or ``(n, embedding_dim)`` with ``fusion_mode="id"``.
    """

    projects_features = True
    static_steps = True

    def __init__(
        self,
        train: Interactions,
        features: Mapping[str, Tensor],
        *,
        embedding_dim: int = 64,
        l2: float = 1e-3,
        routing: str = "published",
        n_routing: int = 3,
        pruning: bool = True,
        weight_mode: str = "confid",
        fusion_mode: str = "concat",
        regulariser: str = "authors",
    ) -> None:
        super().__init__(train, features, l2=l2)
        for option, value, choices in (
            ("routing", routing, ("published", "paper")),
            ("weight_mode", weight_mode, ("confid", "mean", "max")),
            ("fusion_mode", fusion_mode, ("concat", "id")),
            ("regulariser", regulariser, ("authors", "mmrec")),
        ):
            if value not in choices:
                raise ConfigError(unknown(f"model.{option}", value, choices))
        self.embedding_dim = embedding_dim
        self.n_routing = n_routing if routing == "paper" else 0
        self.pruning, self.weight_mode, self.fusion_mode, self.regulariser = pruning, weight_mode, fusion_mode, regulariser
        n = self.n_users + self.n_items
        self.id_embedding = nn.Parameter(torch.empty(n, embedding_dim))
        self.preference = nn.ParameterDict({m: nn.Parameter(torch.empty(self.n_users, embedding_dim)) for m in self.modalities})
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], embedding_dim) for m, x in features.items()})
        self.confidence = nn.Parameter(torch.empty(n, len(self.modalities))) if weight_mode == "confid" else None
        self.edges = BipartiteEdges(train, next(iter(features.values())).dtype)
        for modality, matrix in features.items():
            self.register_buffer(f"features_{modality}", matrix, persistent=False)
            self.register_buffer(f"mean_features_{modality}", matrix.mean(0), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal tables, torch's default for the projections (as the authors do)."""
        for table in (self.id_embedding, *self.preference.values()):
            nn.init.xavier_normal_(table)
        if self.confidence is not None:
            nn.init.xavier_normal_(self.confidence)
        for linear in self.projection.values():
            linear.reset_parameters()  # type: ignore[operator]

    @property
    def dense_work(self) -> float:
        return float(sum(self.get_buffer(f"features_{m}").numel() for m in self.modalities) * self.embedding_dim)

    def blocks(self, views: Sequence[View]) -> dict[View, list[Embeddings]]:
        """ID block, then one a modality; each modality's affinities are computed at most once present and once absent."""
        affinities = {}
        for modality in self.modalities:
            if any(modality in view for view in views):
                affinities[modality, True] = self._present(modality)
            if any(modality not in view for view in views):
                affinities[modality, False] = self._absent(modality)
        users, items = unit_rows(self.id_embedding).split([self.n_users, self.n_items])
        found = {}
        for view in views:
            chosen = [affinities[m, m in view] for m in self.modalities]
            with self.gradient(view):
                found[view] = [self._propagate(users, items, *self.weights(chosen))]
            if self.fusion_mode == "concat":
                found[view] += [one.rows for one in chosen]
        return found

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """BPR and the regulariser (``l2``) on the batch's stored embeddings and preferences."""
        ids, preferences = mean_squares(batch.triples, self.id_embedding, self.preference.values())
        norm = ids + preferences
        if self.regulariser == "mmrec":
            norm = norm + self.preference[self.modalities[0]].square().mean()
        return {"bpr": bpr_loss(batch.margin), "l2": self.l2 * norm}

    def weights(self, chosen: Sequence[Affinity]) -> tuple[Tensor, Tensor]:
        """w of messages to users and to items, ``(E,)`` each, from every modality in the view's state."""
        to_users, to_items = [one.at_users for one in chosen], [one.at_items for one in chosen]
        if self.confidence is not None:
            of_users, of_items = self.confidence.split([self.n_users, self.n_items])
            to_users = [alpha * c.index_select(0, self.edges.items) for alpha, c in zip(to_users, of_items.unbind(1), strict=True)]
            to_items = [alpha * c.index_select(0, self.edges.users) for alpha, c in zip(to_items, of_users.unbind(1), strict=True)]
        found = []
        for alphas in (to_users, to_items):
            weight = torch.stack(alphas).mean(0) if self.weight_mode == "mean" else reduce(torch.maximum, alphas)
            found.append(torch.relu(weight) if self.pruning else weight)
        return found[0], found[1]

    def _propagate(self, users: Tensor, items: Tensor, to_users: Tensor, to_items: Tensor) -> Embeddings:
        """r_id: the normalised ID rows plus two layers of messages."""
        users1, items1 = self.edges.to_users(to_users, items), self.edges.to_items(to_items, users)
        users2, items2 = self.edges.to_users(to_users, items1), self.edges.to_items(to_items, users1)
        return Embeddings(users + users1 + users2, items + items1 + items2)

    def _present(self, modality: str) -> Affinity:
        edges = self.edges
        users = unit_rows(self.preference[modality])
        items = unit_rows(F.leaky_relu(project(self.get_buffer(f"features_{modality}"), self.projection[modality])))
        for _ in range(self.n_routing):
            alpha = edges.softmax_at_users(edges.similarity(users, items))
            users = unit_rows(users + edges.to_users(alpha, items))
        logits = edges.similarity(users, items)
        at_users, at_items = edges.softmax_at_users(logits), edges.softmax_at_items(logits)
        return Affinity(Embeddings(users + edges.to_users(at_users, items), items + edges.to_items(at_items, users)), at_users, at_items)

    def _absent(self, modality: str) -> Affinity:
        """All rows of a side are equal, so a message is that row itself; users or items without edges receive none."""
        edges = self.edges
        lonely = F.normalize(self.preference[modality].mean(0), dim=0)
        item = F.normalize(F.leaky_relu(self.projection[modality](self.get_buffer(f"mean_features_{modality}"))), dim=0)
        user = lonely
        for _ in range(self.n_routing):
            user = F.normalize(user + item, dim=0)
        at_users, at_items = (share(torch.zeros_like(edges.zeros)) for share in (edges.softmax_at_users, edges.softmax_at_items))
        users = torch.where(edges.user_has_edges, user + item, lonely)
        items = torch.where(edges.item_has_edges, user + item, item)
        return Affinity(Embeddings(users, items), at_users, at_items)
