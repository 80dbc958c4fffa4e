r"""The contrastive losses of MGCN (within a batch) and MICRO (over all items), with cosine similarity."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckd_fed.errors import ConfigError

_BLOCK = 2**20  # similarities in memory at once: they should stay in the cache

_LOWEST_TEMPERATURE = 0.02  # exp(-2 / 0.02) is still a float32


def checked_temperature(value: float) -> float:
    """A temperature at which no exponential of a cosine underflows.

    Raises:
        ConfigError: a lower one.
    """
    if value < _LOWEST_TEMPERATURE:
        raise ConfigError(f"model.temperature is {value!r}; a number of at least {_LOWEST_TEMPERATURE} is needed")
    return value


def info_nce(anchors: Tensor, targets: Tensor, temperature: float) -> Tensor:
    r"""InfoNCE within a batch, as MGCN has it: every row's own target against all targets, repeated ones included.

    .. math:: \frac1B \sum_i -\log \frac{e^{\cos(a_i, b_i)/\tau}}{\sum_j e^{\cos(a_i, b_j)/\tau}}

    Args:
        anchors, targets: a and b, ``(B, d)``.
        temperature: tau.
    """
    similarity = F.normalize(anchors, dim=-1) @ F.normalize(targets, dim=-1).T / temperature  # (B, B)
    return F.cross_entropy(similarity, torch.arange(len(anchors), device=anchors.device))


def catalogue_contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    r"""C(a, b) of MICRO: every item's b against all items' a and b, one direction.

    .. math:: \frac1N \sum_i -\log \frac{e^{s(a_i,b_i)}}{\sum_{j \ne i} e^{s(a_i,a_j)} + \sum_j e^{s(a_i,b_j)}}, \quad s = \cos / \tau

    Blocks of rows are done one after the other, forward and gradient together, so memory is linear in N and no similarity is computed
    twice; the gradient is exact. The work is quadratic: 12 N^2 d multiply-adds with the gradient, half of it where a is b.

    Args:
        a, b: ``(N, d)``; may be one tensor.
        temperature: tau, at least 0.02.
    """
    return _Contrast.apply(F.normalize(a, dim=-1), None if a is b else F.normalize(b, dim=-1), temperature)


class _Contrast(torch.autograd.Function):
    """On rows of unit norm, b being None where it is a; the gradient is ready when the loss is, for the loss is a scalar."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, temperature: float) -> Tensor:
        n, d = a.shape
        ctx.n, wanted = n, any(ctx.needs_input_grad)
        table = a if b is None else torch.cat([a, b])
        targets = a if b is None else b
        # An item's a is not contrasted with itself. Where b is a, all the others are there twice: half of the own one, and twice the sum.
        times, itself = (2.0, 0.5) if b is None else (1.0, 0.0)
        # exp((cos - 1) / tau): no overflow at any tau. The -1 / tau and the row sums ride along as a column of the products.
        both = torch.cat([table, a.new_ones(len(table), 1)], 1)  # (2n, d + 1), or (n, d + 1) where b is a
        total = a.new_zeros(())
        grad = torch.zeros_like(both[:, :d])  # of a, then of b
        rows = max(1, _BLOCK // len(table))
        for start in range(0, n, rows):
            block = a[start : start + rows]  # (rows, d)
            here = torch.arange(len(block), device=a.device)
            scaled = torch.cat([block, -a.new_ones(len(block), 1)], 1) / temperature
            e = (scaled @ both.T).exp_()  # (rows, 2n)
            e[here, start + here] *= itself
            sums = e @ both  # (rows, d + 1)
            denominator = sums[:, d:]
            own = (block * targets[start : start + len(block)]).sum(1)
            total += (times * denominator).log().sum() - ((own - 1) / temperature).sum()
            if wanted:
                grad[start : start + len(block)] += sums[:, :d] / denominator
                grad.addmm_(e.T, block / denominator)
        if wanted:
            grad[:n] -= targets
            grad[-n:] -= a
            ctx.save_for_backward(grad.div_(n * temperature))
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = ctx.saved_tensors
        of_a, *of_b = (gradients[0] * grad).split(ctx.n)
        return of_a, of_b[0] if of_b else None, None
