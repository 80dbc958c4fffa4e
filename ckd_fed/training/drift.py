r"""What Adam does to a row while it has no gradient, all at once.

Of a large embedding table a batch reads a few rows, and yet Adam moves all of them in every step: a row without a gradient moves on by its
momentum. With the moments m, v that a row had after step s, the k steps without a gradient after it come to

.. math:: m \leftarrow \beta_1^k m, \quad v \leftarrow \beta_2^k v, \quad
          p \leftarrow p - m \sum_{j=1}^{k} \frac{c_j}{\sqrt v / g_j + \epsilon}, \quad
          c_j = \frac{\eta\,\beta_1^j}{1 - \beta_1^{s+j}}, \quad g_j = \sqrt{\frac{1 - \beta_2^{s+j}}{\beta_2^j}} .

(Kingma, Ba, ICLR 2015, with a gradient of zero.) The sum depends on s and k, which a row has for itself, and on v, which every entry has for
itself. But :math:`1 / (\sqrt v / g + \epsilon) = g / (\sqrt v + \epsilon g)` is smooth in g, nearly linear, and after the first hundred steps
the g of one sum lie close together: interpolated at N Chebyshev nodes :math:`x_i` of their range the sum is

.. math:: \sum_{i=1}^{N} \frac{w_i x_i}{\sqrt v + \epsilon x_i}, \quad w_i = \sum_{j=1}^{k} c_j L_i(g_j)

with :math:`L_i` the Lagrange polynomials: N terms an entry instead of k. As :math:`\beta_1^{160}` is 5e-8, later steps add nothing in float32.
With six nodes the sum is right to 1e-6 from step 100 on and to 2e-8 from step 300 on, with four to 2e-7 from step 1000 on, whatever v is (a
test holds it to that); what is added to a parameter is smaller than itself by orders.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ckd_fed.kernels import Kernels

BETAS = (0.9, 0.999)
EPS = 1e-8
FROM_STEP = 100  # before it the g of one sum differ too much
_LASTS = 160  # steps for which momentum moves a row
_BLOCK = 1 << 16  # numbers of a table that are worked on at a time, so that they stay in the cache


@lru_cache(maxsize=16)
def _terms(learning_rate: float, step: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a row whose last step was this one the n nodes x, and by the number of steps after it the sums w x, ``(_LASTS + 1, n)``.

    Found once for all tables that take the same steps.
    """
    j = np.arange(1, _LASTS + 1, dtype=np.float64)
    c = learning_rate * BETAS[0] ** j / (1 - BETAS[0] ** (step + j))
    g = np.sqrt((1 - BETAS[1] ** (step + j)) / BETAS[1] ** j)
    nodes = (g[-1] + g[0]) / 2 + (g[-1] - g[0]) / 2 * np.cos(np.pi * (2 * np.arange(n) + 1) / (2 * n))
    itself = np.eye(n, dtype=bool)
    factors = np.where(itself, 1.0, (g[:, None, None] - nodes) / (nodes[:, None] - nodes + itself))  # (_LASTS, i, other node)
    sums = np.zeros((_LASTS + 1, n))
    np.cumsum(c[:, None] * factors.prod(2), axis=0, out=sums[1:])
    return nodes, sums * nodes


class Drift:
    """Moves rows by the steps that they have missed.

    Args:
        learning_rate: of every step.
        step: the step after which rows may begin to miss some, at least ``FROM_STEP``.

    Attributes:
        step: the last one that was taken.
    """

    def __init__(self, learning_rate: float, step: int) -> None:
        if step < FROM_STEP:
            raise ValueError(f"steps can be made up for from {FROM_STEP} on, not from {step}")
        self._learning_rate = learning_rate
        self._n = 6 if step < 1000 else 4
        self._first = self.step = step
        # What a row needs whose last step was s, by s counted from the first: x, and w x for the steps from there to now.
        self._nodes, self._products = np.empty((256, self._n)), np.empty((256, self._n))
        self._narrow: tuple[np.ndarray, ...] = ()  # for the kernel, in float32: x times epsilon, w x, and by k what k steps leave of each moment
        self._sums = np.zeros((_LASTS + 1, _LASTS + 1, self._n))  # of the last s, in turn: w x by the number of steps
        self._add()

    def advance(self) -> None:
        """A step was taken."""
        self.step += 1
        self._add()

    def _add(self) -> None:
        at = self.step - self._first
        if at == len(self._nodes):
            self._nodes, self._products = (np.concatenate([known, np.empty_like(known)]) for known in (self._nodes, self._products))
        self._nodes[at], self._sums[at % (_LASTS + 1)] = _terms(self._learning_rate, self.step, self._n)
        lasts = np.arange(max(0, at - _LASTS), at + 1)
        self._products[lasts] = self._sums[lasts % (_LASTS + 1), at - lasts]
        if self._narrow:
            self._narrow_down(lasts[0])

    def _narrow_down(self, start: int) -> None:
        """The kernel's numbers of all steps, of which those before one are known."""
        if not self._narrow or len(self._narrow[0]) != len(self._nodes):
            n, start = len(self._nodes), 0
            kept = (np.power(beta, np.arange(n)).astype(np.float32) for beta in BETAS)
            self._narrow = np.empty((n, self._n), dtype=np.float32), np.empty((n, self._n), dtype=np.float32), *kept
        these = slice(start, self.step - self._first + 1)
        np.multiply(self._nodes[these], EPS, out=self._narrow[0][these], casting="same_kind")
        self._narrow[1][these] = self._products[these]

    def apply_compiled(self, compiled: Kernels, tables: tuple[Tensor, Tensor, Tensor], last: Tensor, rows: Tensor | None = None) -> None:
        """As :meth:`apply` by the compiled kernel, of some rows of tables or of all, in place.

        Args:
            compiled: the kernels.
            tables: a parameter and its moments, ``(n, d)``, float32 and contiguous.
            last: the step after which each row is as it stands, ``(n,)``; then the last one of those moved.
            rows: numbers of rows, each once, ``(k,)``; None for all.
        """
        if not self._narrow:
            self._narrow_down(0)
        nodes, products, *kept = self._narrow
        compiled.drift(tables, last, self._first, self.step, nodes, products, (kept[0], kept[1]), rows)

    def apply(self, parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last: Tensor) -> None:
        """Bring rows to where the last step left them.

        Args:
            parameter, exp_avg, exp_avg_sq: rows and their moments, ``(n, d)``, on the CPU; changed in place.
            last: the step after which each was as given, ``(n,)``.
        """
        n = max(1, _BLOCK // parameter.shape[1])
        for p, m, v, s in zip(*(x.split(n) for x in (parameter, exp_avg, exp_avg_sq, last)), strict=True):
            self._apply(p, m, v, s)

    def _apply(self, parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last: Tensor) -> None:
        index = (last - self._first).numpy()
        root, total, quotient = exp_avg_sq.sqrt(), torch.zeros_like(parameter), torch.empty_like(parameter)
        for x, wx in zip(self._nodes[index].T, self._products[index].T, strict=True):
            torch.add(root, torch.from_numpy(x * EPS).to(root)[:, None], out=quotient)
            total += torch.div(torch.from_numpy(wx).to(root)[:, None], quotient, out=quotient)
        parameter.addcmul_(exp_avg, total, value=-1)
        missed = self.step - last.numpy()
        for moment, beta in zip((exp_avg, exp_avg_sq), BETAS, strict=True):
            moment *= torch.from_numpy(beta**missed).to(moment)[:, None]
