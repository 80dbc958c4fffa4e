r"""MMGCN: one graph-convolution branch per modality over the user-item graph, averaged (the form used by CKD).

Wei, Wang, Nie, He, Hong, Chua. "MMGCN: Multi-modal Graph Convolution Network for Personalized Recommendation of Micro-video".
ACM MM 2019, doi 10.1145/3343031.3351034.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Asked, Backbone, Embeddings, Pass, RankingBatch, StepOutput, View
from ckd_fed.backbones.gather import Gather, Index, gather_rows
from ckd_fed.backbones.graph import Propagation, row_normalised_adjacency
from ckd_fed.backbones.inverted import compacted
from ckd_fed.backbones.projection import project
from ckd_fed.data.interactions import Interactions


class Branch(nn.Module):
    r"""Three propagation layers of one modality, with the ID embedding added to each.

    .. math:: x \leftarrow \phi(G\,\phi(\hat A\, C x) + \phi(L x) + e_{id}), \quad x_0 = \mathrm{norm}([q; W f + b])

    with phi the leaky ReLU (slope 0.01), C, G, L linear maps with bias, and A-hat the row-normalised adjacency with self loops.
    """

    LAYERS = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.LAYERS))
        self.linear = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.LAYERS))
        self.gate = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.LAYERS))

    def reset_parameters(self) -> None:
        for linear in (*self.conv, *self.linear, *self.gate):
            linear.reset_parameters()  # type: ignore[operator]

    def layer(self, number: int, x: Tensor, propagate: nn.Module, variants: int = 1) -> Tensor:
        """A layer before the ID embedding is added and phi taken.

        Args:
            number: of the layer, from 0.
            x: ``(n * variants, d)``, a node's variants one after the other.
            propagate: multiplication by A-hat.
            variants: how many there are.

        Returns:
            As x.
        """
        # In place only on tensors of their own: on a view, autograd would copy the whole of it in the backward.
        h = F.leaky_relu_(propagate(self.conv[number](x).view(len(x) // variants, -1))).view(x.shape)
        return self.gate[number](h).add_(F.leaky_relu_(self.linear[number](x)))

    def forward(self, x: Tensor, id_embedding: Tensor, propagate: nn.Module, wanted: Index | None = None) -> Tensor:
        """The layers after the first, for several variants at once.

        Args:
            x: what the first layer gave, ``(n_users + n_items, variants, d)``.
            id_embedding: ``(n_users + n_items, d)``.
            propagate: multiplication by A-hat.
            wanted: nodes whose rows are asked for; None for all.

        Returns:
            As x, or these rows of it, ``(k, variants, d)``.
        """
        n, variants, dim = x.shape
        shared = self._repeated(id_embedding, variants)
        x = x.reshape(-1, dim)
        for number in range(1, self.LAYERS if wanted is None else self.LAYERS - 1):
            x = F.leaky_relu_(self.layer(number, x, propagate, variants).add_(shared))
        if wanted is not None:
            x = self._last_layer(x.view(n, -1), gather_rows(id_embedding, wanted)[0], propagate, wanted)
        return x.view(-1, variants, dim)

    def _last_layer(self, x: Tensor, id_embedding: Tensor, propagate: nn.Module, wanted: Index) -> Tensor:
        r"""As :meth:`layer` for some nodes, the ID embedding and phi included.

        Rows of A-hat sum to one, so :math:`\hat A (C x + b) = C (\hat A x) + b`: only these nodes' rows take part in any dense product.

        Args:
            x: ``(n_users + n_items, variants * d)``.
            id_embedding: of the nodes, ``(k, d)``.
            propagate: multiplication by A-hat.
            wanted: the nodes.

        Returns:
            ``(k * variants, d)``.
        """
        variants = x.shape[1] // id_embedding.shape[1]
        around, own = (gather_rows(rows, wanted)[0].view(-1, id_embedding.shape[1]) for rows in (propagate(x), x))
        conv, linear, gate = (maps[self.LAYERS - 1] for maps in (self.conv, self.linear, self.gate))
        h = gate(F.leaky_relu_(conv(around))).add_(F.leaky_relu_(linear(own)))
        return F.leaky_relu_(h.add_(self._repeated(id_embedding, variants)))

    @staticmethod
    def _repeated(rows: Tensor, variants: int) -> Tensor:
        """Each row once for every variant, ``(n * variants, d)``."""
        return rows.unsqueeze(1).expand(-1, variants, -1).reshape(-1, rows.shape[1])


class MMGCN(Backbone):
    r"""The embedding of a view is the mean of its branches, each with its modality present or absent.

    A branch is propagated at most twice a step, present and absent side by side in one sparse product, however many views are asked
    for. Where its modality is absent all users enter it with one row and all items with another, so the first layer is computed once for
    every side and degree, and not for every node. The users' preferences are Parameters (in the published code they are constants that
    differ in every process). A teacher, built from one modality, is that modality's branch alone.

    Args:
        train, features, l2: see :class:`~ckd_fed.backbones.base.Backbone`; the training interactions are the graph.
        embedding_dim: width of all embeddings.

    Shapes:
        embeddings ``(n, embedding_dim)``.
    """

    projects_features = True
    static_steps = True

    def __init__(self, train: Interactions, features: Mapping[str, Tensor], *, embedding_dim: int = 64, l2: float = 1e-5) -> None:
        super().__init__(train, features, l2=l2)
        self.user_embedding = nn.Parameter(torch.empty(self.n_users, embedding_dim))
        self.item_embedding = nn.Parameter(torch.empty(self.n_items, embedding_dim))
        self.preference = nn.ParameterDict({m: nn.Parameter(torch.empty(self.n_users, embedding_dim)) for m in self.modalities})
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], embedding_dim) for m, x in features.items()})
        self.branch = nn.ModuleDict({m: Branch(embedding_dim) for m in self.modalities})
        dtype = next(iter(features.values())).dtype
        self.propagate = Propagation(row_normalised_adjacency(train), dtype)
        is_item, kind, between = kinds(train)
        self.register_buffer("is_item", torch.from_numpy(is_item), persistent=False)
        self.register_buffer("kind", torch.from_numpy(kind), persistent=False)
        self.propagate_kinds = Propagation(between, dtype)
        for modality, matrix in features.items():
            self.register_buffer(f"features_{modality}", matrix, persistent=False)
            self.register_buffer(f"mean_features_{modality}", matrix.mean(0), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform ID embeddings, Xavier-normal preferences, torch's default for linear maps (as published)."""
        for table in (self.user_embedding, self.item_embedding):
            nn.init.xavier_uniform_(table)
        for table in self.preference.values():
            nn.init.xavier_normal_(table)
        for linear in self.projection.values():
            linear.reset_parameters()  # type: ignore[operator]
        for branch in self.branch.values():
            branch.reset_parameters()  # type: ignore[operator]

    def branches(self, views: Sequence[View], wanted: Index | None = None) -> dict[str, tuple[list[bool], Tensor]]:
        """Every branch once, with its modality present, absent or both, as the views need.

        Args:
            views: what is asked for.
            wanted: for which nodes, users first; None for all.

        Returns:
            Modality -> (states, outputs), outputs of shape ``(k, len(states), d)`` for the states in their order, True being present.
        """
        id_embedding = torch.cat([self.user_embedding, self.item_embedding])
        found = {}
        for modality in self.modalities:
            states = [state for state in (True, False) if any((modality in view) is state for view in views)]
            variants = torch.stack([self._first_layer(modality, state, id_embedding) for state in states], dim=1)
            found[modality] = states, self.branch[modality](variants, id_embedding, self.propagate, wanted)
        return found

    def forward(self, views: Sequence[View]) -> Pass:
        """Full tables; branches are shared by the views."""
        branches = self.branches(views)
        tables = {}
        for view in views:
            mean = self._mean(view, branches)
            tables[view] = Embeddings(mean[: self.n_users], mean[self.n_users :])
        return Pass(tables)

    def compute_step(self, asked: Asked) -> StepOutput:
        """As :meth:`Backbone.compute_step`, but the rows of the batches are gathered from the branches and averaged, rather than whole tables,
        and on a CPU the last layer is computed for these rows alone (which they are, a GPU would have to be waited for to know)."""
        gather = Gather(asked.ranking, asked.distillation)
        users, ranking, *pairs = gather.users.rows, *(part + self.n_users for part in gather.items.parts)
        parts = [torch.cat([users, ranking]), *pairs]  # (B + K + 2B,), (K,), (K,)
        wanted = None
        if users.device.type == "cpu":
            nodes, parts = compacted(parts)
            wanted = Index(nodes)
        index = Index.of_parts(parts)
        branches, differences = {}, {}
        for m, (states, outputs) in self.branches(asked.views, wanted).items():
            rows, difference = gather_rows(outputs.flatten(1), index)
            branches[m] = states, rows.view(len(rows), len(states), -1)
            if difference is not None:
                differences[m] = states, difference.view(len(difference), len(states), -1)
        output = StepOutput({}, {}, {})
        for view in asked.views:
            with self.gradient(view):
                users, items = self._mean(view, branches).split([len(gather.users), len(gather.items.rows)])
                done = gather.rows(users, items, self._mean(view, differences) if differences else None)
            if view in asked.ranking_views:
                output.ranking[view] = done.ranking_margin()
            if view in asked.distillation_views:
                output.distillation[view] = done.distillation_margin()
            if view == self.joint:
                output.loss_terms = self.losses(RankingBatch(asked.ranking, output.ranking[view], done[:3]))
        return output

    def _mean(self, view: View, branches: Mapping[str, tuple[list[bool], Tensor]]) -> Tensor:
        """Mean over modalities of the branch rows in the view's states, ``(n, d)``."""
        rows = [outputs.unbind(1)[states.index(m in view)] for m, (states, outputs) in branches.items()]
        return torch.stack(rows).mean(0) if len(rows) > 1 else rows[0]

    def _first_layer(self, modality: str, present: bool, id_embedding: Tensor) -> Tensor:
        """What the first layer of a branch gives, ``(n_users + n_items, d)``; it enters as rows of unit norm."""
        linear, preference, branch = self.projection[modality], self.preference[modality], self.branch[modality]
        if present:
            x = F.normalize(torch.cat([preference, project(self.get_buffer(f"features_{modality}"), linear)]), dim=-1)
            return F.leaky_relu_(branch.layer(0, x, self.propagate).add_(id_embedding))  # type: ignore[operator]
        mean = linear(self.get_buffer(f"mean_features_{modality}"))
        sides = F.normalize(torch.stack([preference.mean(0), mean]), dim=-1)  # (2, d)
        rows = branch.layer(0, F.embedding(self.get_buffer("is_item"), sides), self.propagate_kinds)  # type: ignore[operator]
        return F.leaky_relu_(gather_rows(rows, Index(self.get_buffer("kind")))[0] + id_embedding)


def kinds(train: Interactions) -> tuple[np.ndarray, np.ndarray, sp.csr_array]:
    """Nodes of one side and degree as one kind each: A-hat x is the same for them all where x is the same for each side.

    Returns:
        Whether a kind is one of items ``(K,)`` int64; each node's kind ``(n_users + n_items,)``; and ``(K, K)``, what A-hat is between them.
        Any kind may stand for all of its side.
    """
    degree = np.concatenate([train.degree, np.bincount(train.items, minlength=train.n_items)])
    item = np.arange(len(degree)) >= train.n_users
    found, kind = np.unique(np.stack([item, degree]), axis=1, return_inverse=True)
    n = np.arange(found.shape[1])
    other = np.where(found[0] == 0, n[-1], 0)  # users' kinds come first
    share = 1 / (found[1] + 1)
    between = sp.csr_array((np.concatenate([share, 1 - share]), (np.concatenate([n, n]), np.concatenate([n, other]))), shape=(len(n), len(n)))
    return found[0], kind.reshape(-1), between
