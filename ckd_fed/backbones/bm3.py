r"""BM3: bootstrapped multimodal learning without negatives, where features enter the loss and not the scores.

Zhou, Zhou, Liu, Zeng, Miao, Wang, You, Jiang. "Bootstrap Latent Representations for Multi-modal Recommendation". WWW 2023,
doi 10.1145/3543507.3583251, arXiv:2207.05969.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Asked, Backbone, Embeddings, Pass, RankingBatch, StepOutput, View
from ckd_fed.backbones.gather import Gather
from ckd_fed.backbones.graph import Propagation, light_gcn, symmetric_normalised_adjacency
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError


class BM3(Backbone):
    r"""LightGCN whose representations predict each other and those of the items' features through one shared linear map.

    With A-hat the symmetrically normalised adjacency (degrees plus 1e-7), pr the predictor and L layers,

    .. math:: [h_u; h_i] = \tfrac1{L+1}\sum_{l=0}^L \hat A^l [p; t] + [0; t], \quad s(u,i) = pr(h_u) \cdot pr(h_i) .

    Features do not enter a score: **every view has the same tables, and all causal effects are 0 by construction**
    (:attr:`scores_use_features` is False).

    The loss knows no negatives. With :math:`f_m = W_m e_m + b_m`, T the value without gradient after dropout, D(a, b) = 1 - cos(a, b)
    and a mean over the batch's pairs (u, i),

    ===================  ==============================================================================
    ``reconstruction``   :math:`D(pr(h_u), T(h_i)) + D(pr(h_i), T(h_u))`
    ``alignment``        :math:`\gamma \sum_m D(pr(f_m), T(h_i)) + D(pr(f_m), T(f_m))`
    ``l2``               :math:`\lambda\,(\|h_U\|_F + \|h_I\|_F) / |I|` over all users and all items, not squared
    ===================  ==============================================================================

    The published e_m is an embedding that starts as the features and is trained. Here it is features (a constant buffer that is never
    saved nor sent) plus a trained drift that starts at 0: Adam moves the one as it moves the other. A teacher has its own modality's
    terms alone. MMRec's source and the authors' are the same. A modality's terms are means over the pairs whose item has it.

    Dropout is drawn once a step for each table and shared by every use of it; a user or item that is in the batch twice has one mask.

    Args:
        train, features, present: see :class:`~ckd_fed.backbones.base.Backbone`; the training interactions are the graph.
        l2: weight lambda of the term ``l2``.
        embedding_dim: width d of all embeddings.
        n_layers: layers L of LightGCN.
        dropout: probability p, below 1, that an entry of a target is dropped; kept ones are scaled by 1 / (1 - p).
        contrastive_weight: weight gamma of the alignment with features.

    Shapes:
        embeddings ``(n, embedding_dim)``, after the predictor.
    """

    scores_use_features = False

    def __init__(
        self,
        train: Interactions,
        features: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
        *,
        embedding_dim: int = 64,
        l2: float = 0.1,
        n_layers: int = 1,
        dropout: float = 0.3,
        contrastive_weight: float = 2.0,
    ) -> None:
        super().__init__(train, features, present, l2=l2)
        if not dropout < 1:
            raise ConfigError(f"model.dropout is {dropout!r}; a share of at least 0 and below 1 is needed")
        self.embedding_dim, self.n_layers, self.dropout, self.contrastive_weight = embedding_dim, n_layers, dropout, contrastive_weight
        self.user_embedding = nn.Parameter(torch.empty(self.n_users, embedding_dim))
        self.item_embedding = nn.Parameter(torch.empty(self.n_items, embedding_dim))
        self.predictor = nn.Linear(embedding_dim, embedding_dim)
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], embedding_dim) for m, x in features.items()})
        self.drift = nn.ParameterDict({m: nn.Parameter(torch.empty_like(x)) for m, x in features.items()})
        dtype = next(iter(features.values())).dtype
        self.propagate = Propagation(symmetric_normalised_adjacency(train, 1e-7), dtype)
        for modality, matrix in features.items():
            self.register_buffer(f"features_{modality}", matrix, persistent=False)
        self._generator = torch.Generator().manual_seed(0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform embeddings, Xavier-normal weights, torch's default biases (as published); no drift."""
        for table in (self.user_embedding, self.item_embedding):
            nn.init.xavier_uniform_(table)
        for linear in (self.predictor, *self.projection.values()):
            linear.reset_parameters()  # type: ignore[operator]
            nn.init.xavier_normal_(linear.weight)  # type: ignore[arg-type]
        for drift in self.drift.values():
            nn.init.zeros_(drift)

    @property
    def dense_work(self) -> float:
        return float((self.n_users + self.n_items) * self.embedding_dim**2)

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Dropout draws from the epoch's generator."""
        self._generator = generator

    def forward(self, views: Sequence[View]) -> Pass:
        """The same tables for every view; ``parts`` are h of users and items before the predictor."""
        users, items = self.representations()
        tables = Embeddings(self.predictor(users), self.predictor(items))
        return Pass(dict.fromkeys(views, tables), {"users": users, "items": items})

    def representations(self) -> tuple[Tensor, Tensor]:
        """h of users ``(n_users, d)`` and items ``(n_items, d)``."""
        nodes = light_gcn(self.propagate, torch.cat([self.user_embedding, self.item_embedding]), self.n_layers)
        users, items = nodes.split([self.n_users, self.n_items])
        return users, items + self.item_embedding

    def compute_step(self, asked: Asked) -> StepOutput:
        """As :meth:`Backbone.compute_step`, with one view computed for all of them, and the predictor on the batches' rows alone."""
        users, items = self.representations()
        gather = Gather(asked.ranking, asked.distillation if asked.distillation_views else None)
        of_items, difference = gather.of_items(items)
        if difference is not None:
            difference = F.linear(difference, self.predictor.weight)  # the bias cancels
        rows = gather.rows(self.predictor(gather.of_users(users)), self.predictor(of_items), difference)
        margin = rows.ranking_margin()
        batch = RankingBatch(asked.ranking, margin, rows[:3], {"users": users, "items": items})
        output = StepOutput(self.losses(batch), dict.fromkeys(asked.ranking_views, margin), {})
        if difference is not None:
            output.distillation = dict.fromkeys(asked.distillation_views, rows.distillation_margin())
        return output

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """``reconstruction``, ``alignment`` and ``l2`` of the class docstring; negatives are not used."""
        index, users, items = batch.triples, batch.parts["users"], batch.parts["items"]
        user_target = self._target("user", index.users, F.embedding(index.users, users.detach()), self.n_users)
        item_target = self._target("item", index.first, F.embedding(index.first, items.detach()), self.n_items)
        alignment = []
        for modality in self.modalities:
            positives, of_items, present = index.first, item_target, self.present(modality)
            if present is not None:
                having = present[positives]
                positives, of_items = positives[having], of_items[having]
            entering = F.embedding(positives, self.get_buffer(f"features_{modality}")) + F.embedding(positives, self.drift[modality])
            content = self.projection[modality](entering)  # f_m, (B, d)
            predicted = self.predictor(content)
            target = self._target(modality, positives, content.detach(), self.n_items)
            alignment += [_distance(predicted, of_items), _distance(predicted, target)]
        norm = (torch.linalg.vector_norm(users) + torch.linalg.vector_norm(items)) / self.n_items
        return {
            "reconstruction": _distance(batch.users, item_target) + _distance(batch.positives, user_target),
            "alignment": self.contrastive_weight * torch.stack(alignment).sum(),
            "l2": self.l2 * norm,
        }

    def _target(self, table: str, index: Tensor, rows: Tensor, size: int) -> Tensor:
        """T: rows of a table without gradient, ``(B, d)``, after dropout."""
        return rows * self._keep(table, index, rows, size) / (1 - self.dropout) if self.dropout else rows

    def _keep(self, table: str, index: Tensor, rows: Tensor, size: int) -> Tensor:
        """Mask of the rows ``index`` of a table with ``size`` rows, as if it had been drawn for the whole table.

        Args:
            table: "user", "item" or a modality.
            index: ``(B,)``.
            rows: what is masked, ``(B, d)``.
            size: rows of the whole table.
        """
        keep = torch.rand(rows.shape, generator=self._generator, dtype=torch.float32) >= self.dropout
        position = torch.arange(len(index), device=index.device)
        first = torch.full((size,), len(index), device=index.device).scatter_reduce_(0, index, position, "amin")
        return keep.to(rows.device, rows.dtype).index_select(0, first.index_select(0, index))


def _distance(one: Tensor, two: Tensor) -> Tensor:
    """1 - cosine similarity of rows ``(B, d)``, mean over the batch; 0 where B is 0."""
    similarity = F.cosine_similarity(one, two, dim=-1)
    return 1 - similarity.mean() if len(similarity) else similarity.sum()
