r"""EgoGCN: attention per modality over messages into which the other modalities are fused, edge by edge.

Chen, Wang, Wei, Zheng, Shao. "Breaking Isolation: Multimodal Graph Fusion for Multimedia Recommendation by Edge-wise Modulation".
ACM MM 2022, doi 10.1145/3503161.3548399.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.attention import BipartiteEdges, unit_rows
from ckd_fed.backbones.base import Embeddings, RankingBatch, View, bpr_loss
from ckd_fed.backbones.blocks import BlockBackbone
from ckd_fed.backbones.graph import Propagation, symmetric_normalised_adjacency
from ckd_fed.backbones.grcn import mean_squares
from ckd_fed.backbones.projection import project
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError, unknown


class Nodes(NamedTuple):
    """Rows of users and items, ``(n, d)`` each, or ``(1, d)`` where all are equal."""

    users: Tensor
    items: Tensor


class EgoGCN(BlockBackbone):
    r"""One tower a modality, each hearing the others at its first layer; an ID tower; all concatenated.

    Per modality m, with n() the normalisation of rows to unit norm, phi the leaky ReLU (slope 0.01) and M modalities,
    :math:`X_m = [P_m; n(\phi(W_m f_m + b_m))]` with the preferences P of unit norm. What node j sends to t in tower m is

    .. math:: z_j = \tfrac1M \Big( X_{m,j} + \sum_{o \ne m} \sigma(W_{mo} X_{o,j} + b_{mo}) \odot X_{o,j} \Big)

    with soft fusion. With hard fusion it is the mean of :math:`X_{\cdot,j}` over modalities where :math:`\alpha(j \to t) > \tau`, and
    :math:`X_{m,j}` elsewhere, alpha being the softmax over the neighbours j of t of :math:`X_{m,t} \cdot X_{m,j}`. Then

    .. math::
        Y = n\Big(\sum_j a(j \to t)\, z_j\Big), \quad
        Y \leftarrow n\Big(Y_t + \sum_j \mathrm{softmax}_j(Y_t \cdot Y_j)\, Y_j\Big) \text{ some times}

    with a the softmax of :math:`X_{m,t} \cdot z_j` (reattention) or alpha. Y replaces X; no residual. The ID tower is
    :math:`r_{id} = x + \hat A x + 2 \hat A^2 x` of x = n(e_id) with A-hat symmetrically normalised.

    The loss is BPR plus :math:`\lambda\,(\overline{e_{id}[u]^2 + e_{id}[i]^2} + \sum_m \overline{P_m[u]^2})`, where a bar is the mean over
    entries and i runs over positives and negatives.

    Any number of modalities
        The published model has exactly three: two gates a tower and the divisor 3. Here there is a gate for every ordered pair of
        modalities and the divisor is their number. A teacher has no gates: its tower is plain attention. Hard fusion has no gates at all.

    Peculiarities of the published code, followed
        - Every forward overwrites the preferences by their normalised rows, outside of autograd: a projection onto the unit sphere, and
          gradients that are those of P itself. Here a forward in training does so in place; one in evaluation normalises a copy.
        - The ID tower's third layer is fed the first layer's output, so it equals the second: hence the factor 2.
        - The regulariser's value for the preferences is constant (unit norm); its gradient is radial.
        - ``weight_mode`` must be "GCN" there and edges are not dropped; both are no options here.

    An absent modality has equal rows. It changes its own tower and what the others hear of it; the ID tower stays. The users' row is
    the normalised mean of the normalised preferences.

    Args:
        train, features: see :class:`~ckd_fed.backbones.base.Backbone`; the training interactions are the graph.
        l2: weight lambda of the regulariser.
        embedding_dim: width of each block; there is one for IDs and one a modality.
        fusion: ``soft`` (gates between modalities) or ``hard`` (the mean over modalities where attention exceeds the threshold).
        threshold: attention tau above which hard fusion takes the mean.
        reattention: whether to attend to what is sent, z, rather than to X.
        n_routing: layers of attention after the first.

    Shapes:
        embeddings ``(n, (1 + number of modalities) * embedding_dim)``.
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
        fusion: str = "soft",
        threshold: float = 0.6,
        reattention: bool = True,
        n_routing: int = 1,
    ) -> None:
        super().__init__(train, features, l2=l2)
        if fusion not in ("soft", "hard"):
            raise ConfigError(unknown("model.fusion", fusion, ("soft", "hard")))
        self.embedding_dim, self.fusion, self.threshold = embedding_dim, fusion, threshold
        self.reattention, self.n_routing = reattention, n_routing
        self.id_embedding = nn.Parameter(torch.empty(self.n_users + self.n_items, embedding_dim))
        self.preference = nn.ParameterDict({m: nn.Parameter(torch.empty(self.n_users, embedding_dim)) for m in self.modalities})
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], embedding_dim) for m, x in features.items()})
        self.gate = nn.ModuleDict()  # of a tower -> of the modality it hears
        if fusion == "soft" and len(self.modalities) > 1:
            for m in self.modalities:
                self.gate[m] = nn.ModuleDict({o: nn.Linear(embedding_dim, embedding_dim) for o in self.modalities if o != m})
        dtype = next(iter(features.values())).dtype
        self.edges = BipartiteEdges(train, dtype)
        self.propagate = Propagation(symmetric_normalised_adjacency(train), dtype)
        for modality, matrix in features.items():
            self.register_buffer(f"features_{modality}", matrix, persistent=False)
            self.register_buffer(f"mean_features_{modality}", matrix.mean(0, keepdim=True), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal tables, torch's default for linear maps (as published); the preferences are projected at once."""
        for table in (self.id_embedding, *self.preference.values()):
            nn.init.xavier_normal_(table)
        for linear in (*self.projection.values(), *(gate for tower in self.gate.values() for gate in tower.values())):  # type: ignore[operator]
            linear.reset_parameters()  # type: ignore[operator]
        self.project_preferences()

    @torch.no_grad()
    def project_preferences(self) -> None:
        """Normalise the stored preferences in place. Rows that have unit norm to rounding keep their bits, so doing it twice is doing it once."""
        for table in self.preference.values():
            norm = torch.linalg.vector_norm(table, dim=1, keepdim=True)
            done = (norm - 1).abs() < 16 * torch.finfo(table.dtype).eps
            table.div_(torch.where(done, torch.ones_like(norm), norm.clamp_min(1e-12)))

    @property
    def dense_work(self) -> float:
        projections = sum(self.get_buffer(f"features_{m}").numel() for m in self.modalities) * self.embedding_dim
        gates = len(self.modalities) * (len(self.modalities) - 1) * (self.n_users + self.n_items) * self.embedding_dim**2
        return float(projections + gates)

    def blocks(self, views: Sequence[View]) -> dict[View, list[Embeddings]]:
        """ID block, then one a modality. In training the preferences are projected first.

        Inputs and gates are computed at most once present and once absent; towers once a view, since each hears all modalities.
        """
        if self.training:
            self.project_preferences()
        inputs = {}
        for modality in self.modalities:
            for present in (True, False):
                if any((modality in view) is present for view in views):
                    inputs[modality, present] = self._input(modality, present)
        gated = {} if self.fusion == "hard" else self._gated(inputs)
        by_id = self._id_tower()
        found = {}
        for view in views:
            with self.gradient(view):
                found[view] = [by_id, *(self.route(self.first_layer(m, view, inputs, gated)[0]) for m in self.modalities)]
        return found

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """BPR and the regulariser (``l2``) on the batch's stored ID embeddings and normalised preferences."""
        ids, preferences = mean_squares(batch.triples, self.id_embedding, map(self._preference, self.modalities))
        return {"bpr": bpr_loss(batch.margin), "l2": self.l2 * (ids + preferences)}

    def first_layer(
        self, modality: str, view: View, inputs: Mapping[tuple[str, bool], Nodes], gated: Mapping[tuple[str, str, bool], Nodes]
    ) -> tuple[Nodes, Tensor, Tensor]:
        """Fusion and attention of a tower.

        Returns:
            What every node receives, and the attention of messages to users and to items, ``(E,)`` each.
        """
        edges, others = self.edges, [m for m in self.modalities if m != modality]
        own = inputs[modality, modality in view]
        if self.fusion == "soft":
            heard = [gated[modality, other, other in view] for other in others]
        else:
            heard = [inputs[other, other in view] for other in others]
        mixed = Nodes(*(self._full(sum(rows[1:], rows[0]) / len(self.modalities), n) for rows, n in self._sides(own, *heard)))
        users, items = (self._full(rows[0], n) for rows, n in self._sides(own))
        if self.fusion == "soft":
            if self.reattention:
                at_users, at_items = edges.similarity(users, mixed.items), edges.similarity(mixed.users, items)
            else:
                at_users = at_items = edges.similarity(users, items)
            at_users, at_items = edges.softmax_at_users(at_users), edges.softmax_at_items(at_items)
            return Nodes(edges.to_users(at_users, mixed.items), edges.to_items(at_items, mixed.users)), at_users, at_items
        logits = edges.similarity(users, items)
        at_users, at_items = edges.softmax_at_users(logits), edges.softmax_at_items(logits)
        fuse_to_users, fuse_to_items = at_users > self.threshold, at_items > self.threshold
        if self.reattention:
            at_users = edges.softmax_at_users(torch.where(fuse_to_users, edges.similarity(users, mixed.items), logits))
            at_items = edges.softmax_at_items(torch.where(fuse_to_items, edges.similarity(mixed.users, items), logits))
        by_user = edges.to_users(at_users * fuse_to_users, mixed.items) + edges.to_users(at_users * ~fuse_to_users, items)
        by_item = edges.to_items(at_items * fuse_to_items, mixed.users) + edges.to_items(at_items * ~fuse_to_items, users)
        return Nodes(by_user, by_item), at_users, at_items

    def route(self, received: Nodes) -> Embeddings:
        """The layers after the first, from what that one received."""
        users, items = unit_rows(received.users), unit_rows(received.items)
        for _ in range(self.n_routing):
            to_users, to_items = self.edges.attend(users, items)
            users, items = unit_rows(users + to_users), unit_rows(items + to_items)
        return Embeddings(users, items)

    def _preference(self, modality: str) -> Tensor:
        """P_m: the Parameter itself in training, where it has just been projected."""
        table = self.preference[modality]
        return table if self.training else unit_rows(table)

    def _input(self, modality: str, present: bool) -> Nodes:
        """X_m, one row a side where the modality is absent."""
        users = self._preference(modality)
        features = self.get_buffer(f"features_{modality}" if present else f"mean_features_{modality}")
        items = unit_rows(F.leaky_relu(project(features, self.projection[modality])))
        return Nodes(users if present else unit_rows(users.mean(0, keepdim=True)), items)

    def _gated(self, inputs: Mapping[tuple[str, bool], Nodes]) -> dict[tuple[str, str, bool], Nodes]:
        """What a tower hears of another modality: (tower, modality, present) -> gated rows."""
        return {
            (tower, other, present): Nodes(*(torch.sigmoid(self.gate[tower][other](rows)) * rows for rows in nodes))  # type: ignore[index]
            for (other, present), nodes in inputs.items()
            for tower in self.modalities
            if tower != other
        }

    def _id_tower(self) -> Embeddings:
        x = unit_rows(self.id_embedding)
        once = self.propagate(x)
        return Embeddings(*(x + once + 2 * self.propagate(once)).split([self.n_users, self.n_items]))

    def _sides(self, *nodes: Nodes) -> list[tuple[list[Tensor], int]]:
        """Of users and of items: the rows of some nodes, and how many there are."""
        return [([one.users for one in nodes], self.n_users), ([one.items for one in nodes], self.n_items)]

    @staticmethod
    def _full(rows: Tensor, n: int) -> Tensor:
        return rows.expand(n, -1).contiguous()
