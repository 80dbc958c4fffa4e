"""The user-item part that LATTICE and MICRO put their item graphs beside: LightGCN by default, NGCF or matrix factorisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.backbones.graph import Propagation, light_gcn, row_normalised_adjacency
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError, unknown

KINDS = ("lightgcn", "mf", "ngcf")


class Collaborative(nn.Module):
    r"""User and item embeddings from IDs and interactions alone.

    ============  ======================================================================================================
    ``lightgcn``  mean(E_0, ..., E_L), :math:`E_{l+1} = A E_l`
    ``ngcf``      mean(E_0, n(E_1), ..., n(E_L)), :math:`E_{l+1} = \phi(W_l A E_l) + \phi(B_l (E_l \circ A E_l))`, biases
                  included, phi the leaky ReLU (slope 0.01); without the message dropout of 0.1 that the published code adds
    ``mf``        E_0
    ============  ======================================================================================================

    A is row-normalised with self loops, D^-1 (A + I), as in the published LATTICE and MICRO (their papers say symmetric).

    Args:
        kind: one of the above.
        train: training interactions.
        dim: width d.
        layers: L.
        dtype: of the graph.

    Raises:
        ConfigError: unknown kind.
    """

    def __init__(self, kind: str, train: Interactions, dim: int, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(unknown("model.collaborative", kind, KINDS))
        self.kind, self.layers = kind, layers
        self.propagate = Propagation(row_normalised_adjacency(train), dtype) if kind != "mf" else None
        deep = layers if kind == "ngcf" else 0
        self.linear = nn.ModuleList(nn.Linear(dim, dim) for _ in range(deep))
        self.product = nn.ModuleList(nn.Linear(dim, dim) for _ in range(deep))

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Propagated users ``(n_users, d)`` and items ``(n_items, d)``."""
        if self.propagate is None:
            return users, items
        x = torch.cat([users, items])
        x = light_gcn(self.propagate, x, self.layers) if self.kind == "lightgcn" else self._ngcf(x, self.propagate)
        of_users, of_items = x.split([len(users), len(items)])
        return of_users, of_items

    def _ngcf(self, x: Tensor, propagate: Propagation) -> Tensor:
        layers = [x]
        for linear, product in zip(self.linear, self.product, strict=True):
            side = propagate(x)
            x = F.leaky_relu(linear(side)) + F.leaky_relu(product(x * side))
            layers.append(F.normalize(x, dim=-1))
        return torch.stack(layers).mean(0)
