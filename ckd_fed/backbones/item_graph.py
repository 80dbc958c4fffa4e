r"""Graphs between items: nearest neighbours by cosine similarity, frozen (of the features) or learned, and their normalisation.

Notation as in the papers: S_ij = x_i . x_j / (|x_i| |x_j|) for the k items j most similar to i, the item itself among them; directed.
A graph is kept as two ``(n_items, K)`` tensors, so no N x N matrix ever exists and a sum of graphs is a concatenation.

Where the published code leaves the finite numbers, and what is done here instead (nothing changes where it is finite):

- a feature row of zeros has no cosine (NaN there): it is similar to nothing, and its only neighbour is the item itself;
- a row whose similarities sum to less than zero has no square root (NaN there): like one that sums to zero, which the published code
  does guard, it takes no part in the normalised graph.

An item that lacks a modality (the published code knows none) is nobody's neighbour in that modality's graph, and what it receives there is
what every item receives where the modality is absent. Its row is empty here, and :meth:`ItemGraphBackbone.spread` fills in what it receives.
It takes no part in the modality's own losses, so its drift stays 0.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.base import Backbone
from ckd_fed.backbones.graph import Csr, constant_product
from ckd_fed.backbones.kept_graphs import load_graph, save_graph
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError, unknown

NORMALISATIONS = ("sym", "rw")
_SEARCH = "nearest-2"  # to be counted up when a search comes to find something else: graphs on disk are known by it
_TINY = 1e-12  # a row of a smaller norm counts as zeros
_BLOCK = 2**22  # similarities in memory at once
_ROWS = 256  # of a block at least: a product of a few rows and a large catalogue waits for memory, at 500,000 items three times as long
_KEPT = 16  # frozen graphs that a process remembers
_WORTH_A_FILE = 10**9  # multiply-adds of a search; fewer take some hundredths of a second, not much more than reading a file


@dataclass(frozen=True, eq=False)
class Neighbours:
    """A weighted directed graph: row i of ``index`` lists item i's neighbours, ``weight`` their weights, both ``(n_items, K)``.

    An item may be listed several times; its weights add up.
    """

    index: Tensor
    weight: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        """S @ x, ``(n_items, d)``, with gradient for the weights too."""
        return F.embedding_bag(self.index, x, per_sample_weights=self.weight, mode="sum")

    def row_sum(self) -> Tensor:
        """Sum of each item's weights, ``(n_items,)``."""
        return self.weight.sum(1)

    def scaled(self, factor: Tensor | float) -> Neighbours:
        """Every weight times a number."""
        return Neighbours(self.index, self.weight * factor)

    def detach(self) -> Neighbours:
        """The same graph as a constant."""
        return Neighbours(self.index, self.weight.detach())

    def constant(self) -> ConstantGraph:
        """The same graph, detached and prepared for many products."""
        return ConstantGraph(self)

    def to_scipy(self) -> sp.csr_array:
        """The same graph as a sparse matrix of float64, duplicates added up."""
        n, k = self.index.shape
        rows = np.repeat(np.arange(n), k)
        return sp.csr_array((self.weight.detach().double().numpy().ravel(), (rows, self.index.numpy().ravel())), shape=(n, n))


class ConstantGraph:
    """A constant graph in compressed-row form, forward and transposed: sorted once, then multiplied by often.

    Args:
        graph: its weights are detached.
    """

    def __init__(self, graph: Neighbours) -> None:
        n, k = graph.index.shape
        index, weight = graph.index.reshape(-1), graph.weight.detach().reshape(-1)
        at = torch.arange(0, n * k + 1, k, device=index.device) if k else torch.zeros(n + 1, dtype=torch.long, device=index.device)
        self._matrix = Csr(at, index, weight, (n, n))
        order = torch.argsort(index, stable=True)
        counts = torch.zeros(n + 1, dtype=torch.long, device=index.device).index_add_(0, index + 1, torch.ones_like(index))
        rows = torch.div(order, max(1, k), rounding_mode="floor")
        self._transposed = Csr(counts.cumsum(0), rows, weight[order], (n, n))

    def __matmul__(self, x: Tensor) -> Tensor:
        """S @ x, ``(n_items, d)``, with gradient for x alone."""
        return constant_product(x, self._matrix, self._transposed)


def union(graphs: Sequence[Neighbours]) -> Neighbours:
    """The sum of some graphs over the same items."""
    return Neighbours(torch.cat([graph.index for graph in graphs], 1), torch.cat([graph.weight for graph in graphs], 1))


def nearest(x: Tensor, k: int, present: Tensor | None = None) -> Neighbours:
    """Each item's k nearest items by cosine similarity (fewer if there are fewer), the item itself included.

    The similarities are computed in blocks of rows; the choice is not differentiable, the chosen similarities are.

    Args:
        x: ``(n_items, dimension)``.
        k: neighbours an item.
        present: which items there are, ``(n_items,)`` bool; the others are nobody's neighbour, and their own weights are 0. None for all.
    """
    if present is not None:
        return _among(nearest(x[present], k), present)
    unit = F.normalize(x, dim=-1, eps=_TINY)
    k = min(k, len(x))
    with torch.no_grad():
        everything = unit.detach()
        index, weight = _search(everything, k)
        empty = (x.detach().norm(dim=-1) < _TINY).unsqueeze(1)  # (n, 1)
        alone = F.one_hot(torch.zeros(1, dtype=torch.long, device=x.device), k).to(x.dtype)  # (1, k): itself once, then nothing
        index = torch.where(empty, torch.arange(len(x), device=x.device).unsqueeze(1), index)
    if x.requires_grad and torch.is_grad_enabled():
        weight = torch.einsum("nd,nkd->nk", unit, F.embedding(index, unit))
    return Neighbours(index, torch.where(empty, alone, weight))


def _search(unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Numbers of each row's k nearest rows and their products, ``(n, k)`` each, most similar first.

    Args:
        unit: ``(n, dimension)``, rows of norm 1 or 0.
        k: at most n.
    """
    n = len(unit)
    rows = min(max(_ROWS, _BLOCK // max(1, n)), max(1, n))
    columns = max(1, _BLOCK // rows)
    # All that stays is written in place: small results kept between large temporaries leave holes that nothing large fits into, and memory grew to
    # that of all similarities.
    memory = unit.new_empty(rows * min(columns, n))
    weight, index = unit.new_full((n, k), -torch.inf), torch.zeros(n, k, dtype=torch.long, device=unit.device)
    for start in range(0, n, rows):
        block = unit[start : start + rows]
        at = slice(start, start + len(block))
        for first in range(0, n, columns):
            others = unit[first : first + columns]
            similarity = torch.mm(block, others.T, out=memory[: len(block) * len(others)].view(len(block), len(others)))
            if len(others) == n:
                torch.topk(similarity, k, out=(weight[at], index[at]))
                continue
            found = similarity.topk(min(k, len(others)))
            best = torch.cat([weight[at], found.values], dim=1).topk(k)
            index[at] = torch.cat([index[at], found.indices + first], dim=1).gather(1, best.indices)
            weight[at] = best.values
    return index, weight


def _among(graph: Neighbours, present: Tensor) -> Neighbours:
    """A graph over some items as one over all: the rows of the others are empty (weights of 0, on themselves)."""
    found = torch.nonzero(present).squeeze(1)
    index = torch.arange(len(present), device=present.device).unsqueeze(1).repeat(1, graph.index.shape[1])
    index[found] = found[graph.index]
    return Neighbours(index, graph.weight.new_zeros(index.shape).index_copy(0, found, graph.weight))


_frozen: OrderedDict[tuple[str, int], Neighbours] = OrderedDict()


def frozen_nearest(features: Tensor, k: int, present: Tensor | None = None) -> Neighbours:
    """:func:`nearest` of constant features, on the CPU; remembered by a hash of them, for they cost seconds to minutes.

    Those that take long are kept on disk too, where :func:`~ckd_fed.backbones.kept_graphs.graphs_kept_in` says so.
    """
    matrix = np.ascontiguousarray(features.detach().cpu().numpy())
    digest = hashlib.sha256(f"{_SEARCH} {matrix.dtype} {matrix.shape} ".encode())
    digest.update(matrix.data)
    if present is not None:
        digest.update(present.cpu().numpy().tobytes())
    key = (digest.hexdigest(), k)
    if key not in _frozen:
        _frozen[key] = _kept_nearest("-".join(map(str, key)), torch.from_numpy(matrix), k, None if present is None else present.cpu())
        if len(_frozen) > _KEPT:
            _frozen.popitem(last=False)
    _frozen.move_to_end(key)
    return _frozen[key]


def _kept_nearest(name: str, features: Tensor, k: int, present: Tensor | None) -> Neighbours:
    """:func:`nearest`, read from disk where it is kept under a name, and else kept there if it took long."""
    n_present = len(features) if present is None else int(present.sum())
    if n_present**2 * features.shape[1] < _WORTH_A_FILE:
        return nearest(features, k, present)
    kept = load_graph(name, (len(features), min(k, n_present)), features.dtype)
    if kept:
        return Neighbours(*kept)
    graph = nearest(features, k, present)
    save_graph(name, graph.index, graph.weight)
    return graph


def inverse(degree: Tensor, power: float) -> Tensor:
    """degree ** -power, and 0 where it is not positive; the gradient is 0 there as well."""
    positive = degree > 0
    return torch.where(positive, torch.where(positive, degree, 1.0) ** -power, 0.0)


def normalise(graph: Neighbours, kind: str = "sym") -> Neighbours:
    """``sym``: d_i^-1/2 S_ij d_j^-1/2; ``rw``: d_i^-1 S_ij; d are the row sums, on both sides.

    Raises:
        ConfigError: another kind.
    """
    if kind not in NORMALISATIONS:
        raise ConfigError(unknown("normalisation", kind, NORMALISATIONS))
    if kind == "rw":
        return Neighbours(graph.index, graph.weight * inverse(graph.row_sum(), 1.0).unsqueeze(1))
    root = inverse(graph.row_sum(), 0.5)
    return Neighbours(graph.index, root.unsqueeze(1) * graph.weight * root[graph.index])


def share(key: str, value: float) -> float:
    """A number from 0 to 1.

    Raises:
        ConfigError: any other; ``key`` is the option's name.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"model.{key} is {value!r}; a number from 0 to 1 is needed")
    return value


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of some tensors, one after the other: a stack would copy them all first."""
    return reduce(torch.add, tensors)


class ItemGraphBackbone(Backbone):
    r"""What FREEDOM, LATTICE, MICRO and MGCN share: ID embeddings, and features e_m that are trained from where they start.

    The published models train the feature table e_m itself, initialised to the features. Here it is the features, a constant, plus a
    trained drift that starts at zero, ``drift.<m>`` of the features' shape: Adam moves it exactly as it would move the table, and no
    feature is a parameter.

    Args:
        train, features, present, l2: see :class:`~ckd_fed.backbones.base.Backbone`.
        embedding_dim: width d of all embeddings.
    """

    def __init__(
        self, train: Interactions, features: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, *, embedding_dim: int, l2: float
    ) -> None:
        super().__init__(train, features, present, l2=l2)
        self.user_embedding = nn.Parameter(torch.empty(self.n_users, embedding_dim))
        self.item_embedding = nn.Parameter(torch.empty(self.n_items, embedding_dim))
        self.drift = nn.ParameterDict({m: nn.Parameter(torch.empty_like(x)) for m, x in features.items()})
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], embedding_dim) for m, x in features.items()})
        for modality, matrix in features.items():
            self.register_buffer(f"features_{modality}", matrix, persistent=False)

    def reset_parameters(self) -> None:
        """Xavier-uniform ID embeddings, features where they start, torch's default for every linear map (as published)."""
        for table in (self.user_embedding, self.item_embedding):
            nn.init.xavier_uniform_(table)
        for drift in self.drift.values():
            nn.init.zeros_(drift)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def features(self, modality: str) -> Tensor:
        """The constant features, ``(n_items, dimension)``."""
        return self.get_buffer(f"features_{modality}")

    def trained_features(self, modality: str) -> Tensor:
        """e_m, ``(n_items, dimension)``; nothing may depend on the rows of items that lack the modality."""
        return self.features(modality) + self.drift[modality]

    def spread(self, modality: str, product: Tensor, absent: Tensor) -> Tensor:
        """S_m x, ``(n_items, d)``, of a product whose rows are empty where an item lacks the modality.

        Args:
            modality: m.
            product: ``(n_items, d)``.
            absent: rows ``(n, d)`` whose mean every item receives where the modality is absent.
        """
        present = self.present(modality)
        return product if present is None else torch.where(present.unsqueeze(1), product, absent.mean(0))

    def nearest(self, modality: str, k: int) -> Neighbours:
        """The k nearest items by the modality's features, :func:`frozen_nearest`."""
        return frozen_nearest(self.features(modality), k, self.present(modality))

    def freeze_graphs(self, k: int, kind: str = "sym") -> None:
        """Keep S^0_m of every modality, the normalised graph of the k nearest items by features, for :meth:`frozen`."""
        for modality in self.modalities:
            graph = normalise(self.nearest(modality, k), kind)
            self.register_buffer(f"frozen_index_{modality}", graph.index, persistent=False)
            self.register_buffer(f"frozen_weight_{modality}", graph.weight, persistent=False)

    def frozen(self, modality: str) -> Neighbours:
        """S^0_m as :meth:`freeze_graphs` kept it."""
        return Neighbours(self.get_buffer(f"frozen_index_{modality}"), self.get_buffer(f"frozen_weight_{modality}"))
