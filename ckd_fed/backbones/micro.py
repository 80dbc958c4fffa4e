r"""MICRO: an item graph learned for every modality, fused by attention and contrasted with the fusion.

Zhang, Zhu, Liu, Zhang, Wu, Wang. "Latent Structure Mining with Contrastive Modality Fusion for Multimedia Recommendation".
IEEE TKDE 2022, arXiv:2111.00678.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Embeddings, Pass, RankingBatch, View
from ckd_fed.backbones.collaborative import Collaborative
from ckd_fed.backbones.contrastive import catalogue_contrast, checked_temperature
from ckd_fed.backbones.item_graph import ConstantGraph, ItemGraphBackbone, Neighbours, nearest, normalise, share, total, union
from ckd_fed.data.interactions import Interactions


class MICRO(ItemGraphBackbone):
    r"""LightGCN over users and items, plus the item IDs propagated over each modality's graph and fused item by item.

    .. math::
        e_u = \mathrm{LGN}(u), \quad e_i = \mathrm{LGN}(i) + \frac{h_i}{|h_i|}, \quad h_i = \sum_m \alpha_{im} z_{m,i}, \quad z_m = S_m^L t, \quad
        S_m = (1-\lambda)\,\mathrm{sym}(S^1_m) + \lambda\,\mathrm{sym}(S^0_m)

    with the frozen and learned graphs S^0_m and S^1_m of LATTICE, normalised before they are mixed, and
    :math:`\alpha_i = \mathrm{softmax}_m\, w \cdot \tanh(W z_{m,i} + b)`, one attention for all modalities. The loss is BPR, L2 and

    .. math:: \beta \sum_m C(z_m, h)

    over all items that have m (:func:`~ckd_fed.backbones.contrastive.catalogue_contrast`), whose work is quadratic in their number.

    As in LATTICE the learned graphs are built with gradient for the first training batch of an epoch and kept for the others; evaluation
    builds them anew.

    An absent modality's S_m is uniform (1/N), so its z_m is the mean item embedding for every item; the attention is computed from it. So is
    the z_m of an item that lacks the modality. Users are the same in every view.

    The sums run over any number of modalities. A teacher has its own modality's C alone; there h = z_m, so it only spreads the items. There is
    one published implementation, the authors'. Its learning rate decays by 0.96 every 50 epochs; here it is constant. There, as ``zero_grad`` was
    in 2021, W_m, b_m and e_m of the learned graphs have gradients of zero in all batches of an epoch but the first, so Adam's momentum moves them
    on through the epoch; here they have none, and Adam passes them over until the next epoch.

    Args:
        train, features, present, l2: see :class:`~ckd_fed.backbones.base.Backbone`; L2 is on the final embeddings.
        embedding_dim: width d of all embeddings.
        neighbours: k, the nearest items that an item is joined to in each modality.
        frozen_share: share lambda of the graphs of the raw features, at most 1; the learned graphs have the rest.
        n_item_layers: layers L over the item graphs.
        n_ui_layers: layers of the user-item part.
        contrastive_weight: weight beta of the contrast C.
        temperature: tau of the contrast C, above 0.
        collaborative: what the user-item part is, ``lightgcn``, ``ngcf`` or ``mf``.
        normalisation: of the item graphs, ``sym`` (D^-1/2 S D^-1/2) or ``rw`` (D^-1 S).

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
        contrastive_weight: float = 0.03,
        temperature: float = 0.5,
        collaborative: str = "lightgcn",
        normalisation: str = "sym",
    ) -> None:
        super().__init__(train, features, present, embedding_dim=embedding_dim, l2=l2)
        self.neighbours, self.frozen_share, self.n_item_layers = neighbours, share("frozen_share", frozen_share), n_item_layers
        self.contrastive_weight, self.temperature, self.normalisation = contrastive_weight, checked_temperature(temperature), normalisation
        self.query = nn.Sequential(nn.Linear(embedding_dim, embedding_dim), nn.Tanh(), nn.Linear(embedding_dim, 1, bias=False))
        self.collaborative = Collaborative(collaborative, train, embedding_dim, n_ui_layers, next(iter(features.values())).dtype)
        self.freeze_graphs(neighbours, normalisation)
        self._kept: dict[str, ConstantGraph] = {}
        self.reset_parameters()

    @property
    def dense_work(self) -> float:
        products = 12 * len(self.modalities) if len(self.modalities) > 1 else 6
        return float(products * self.n_items**2 * self.item_embedding.shape[1])  # multiplications and additions of the contrast

    @property
    def epoch_parameters(self) -> frozenset[str]:
        """Those of the learned graphs."""
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(("drift.", "projection.")))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Forget the learned graphs: the next training batch builds them."""
        self._kept = {}

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables; ``parts`` are h and z_m of the joint view."""
        users, items = self.collaborative(self.user_embedding, self.item_embedding)
        states = self.states(views)
        scores = {key: self.query(z) for key, z in states.items()} if len(self.modalities) > 1 else {}  # (n_items, 1), or (1, 1) where absent
        tables, parts = {}, {}
        for view in views:
            with self.gradient(view):
                h = self._fused(view, states, scores)
                tables[view] = Embeddings(users, items + F.normalize(h, dim=-1))
            if view == self.joint:
                parts = {"fused": h, **{f"content_{m}": states[m, True] for m in self.modalities}}
        return Pass(tables, parts)

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """BPR, L2, and every modality's content against the fused one, over all items that have it."""
        contrasts = []
        for m in self.modalities:
            z = self.having(m, batch.parts[f"content_{m}"])
            h = self.having(m, batch.parts["fused"]) if len(self.modalities) > 1 else z  # one tensor is half the work
            contrasts.append(catalogue_contrast(z, h, self.temperature))
        return {**super().losses(batch), "contrastive": self.contrastive_weight * torch.stack(contrasts).sum()}

    def states(self, views: Sequence[View]) -> dict[tuple[str, bool], Tensor]:
        """z_m of every modality as the views need it: present ``(n_items, d)``, absent ``(1, d)``."""
        present = [m for m in self.modalities if any(m in view for view in views)]
        states: dict[tuple[str, bool], Tensor] = {}
        for m, graph in self.item_graphs(present).items():
            z: Tensor = self.item_embedding
            for _ in range(self.n_item_layers):
                z = self.spread(m, graph @ z, self.item_embedding)
            states[m, True] = z
        mean = self.item_embedding.mean(0, keepdim=True)
        states.update({(m, False): mean for m in self.modalities if any(m not in view for view in views)})
        return states

    def item_graphs(self, modalities: Sequence[str]) -> Mapping[str, Neighbours | ConstantGraph]:
        """S_m of some modalities: with gradient where it is built, the kept one where it is not."""
        if not (self.training and torch.is_grad_enabled()):
            return {m: self._graph(m) for m in modalities}
        if self._kept:
            return {m: self._kept[m] for m in modalities}
        graphs = {m: self._graph(m) for m in self.modalities}
        self._kept = {m: graph.constant() for m, graph in graphs.items()}
        return {m: graphs[m] for m in modalities}

    def _graph(self, modality: str) -> Neighbours:
        learned = normalise(
            nearest(self.projection[modality](self.trained_features(modality)), self.neighbours, self.present(modality)), self.normalisation
        )
        return union([learned.scaled(1 - self.frozen_share), self.frozen(modality).scaled(self.frozen_share)])

    def _fused(self, view: View, states: Mapping[tuple[str, bool], Tensor], scores: Mapping[tuple[str, bool], Tensor]) -> Tensor:
        """h, ``(n_items, d)``; a single modality's is its z."""
        if len(self.modalities) == 1:
            (m,) = self.modalities
            return states[m, m in view].expand(self.n_items, -1)
        logits = torch.cat([scores[m, m in view].expand(self.n_items, 1) for m in self.modalities], 1)  # (n_items, n_modalities)
        shares = logits.softmax(1).split(1, dim=1)
        return total(a * states[m, m in view] for m, a in zip(self.modalities, shares, strict=True))
