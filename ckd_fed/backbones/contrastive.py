r"""The contrastive losses of MGCN (within a batch) and MICRO (over all items), with cosine similarity."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckd_fed.errors import ConfigError

# Similarities are computed, raised to e and summed in tiles that stay in a core's cache, and kept for the gradient by the strip of tiles. Fewer
# rows would have the products pack the table anew more often than they multiply with it.
_ROWS, _COLUMNS, _STRIP = 256, 1024, 2**22

_LOWEST_TEMPERATURE = 0.02  # exp(1 / 0.02), summed over all items, and exp(-1 / 0.02) are still float32


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

    Strips of rows are done one after the other, forward and gradient together, so memory is linear in N and no similarity is computed
    twice; the gradient is exact. The work is quadratic: 6 N^2 d multiply-adds with the gradient, half of it where a is b.

    Args:
        a, b: ``(N, d)``; may be one tensor.
        temperature: tau, at least 0.02.
    """
    return _Contrast.apply(F.normalize(a, dim=-1), None if a is b else F.normalize(b, dim=-1), temperature)


class _Contrast(torch.autograd.Function):
    """On rows of unit norm, b being None where it is a; the gradient is ready when the loss is, for the loss is a scalar."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, temperature: float) -> Tensor:
        ctx.n, wanted = len(a), any(ctx.needs_input_grad)
        table = a if b is None else torch.cat([a, b])  # (2n, d), or (n, d) where b is a
        targets = a if b is None else b
        # An item's a is not contrasted with itself. Where b is a, all the others are there twice: half of the own one, and twice the sum.
        times, itself = (2.0, 0.5) if b is None else (1.0, 0.0)
        own = (a * targets).sum(1, keepdim=True) / temperature
        total = a.new_zeros(())
        grad = torch.zeros_like(table)  # of a, then of b
        rows = max(1, min(_ROWS, len(a), _STRIP // max(1, len(table))))
        kept = a.new_empty(rows, len(table))
        for start in range(0, len(a), rows):
            block = a[start : start + rows]  # (rows, d)
            scaled, strip = block / temperature, kept[: len(block)]
            sums, weighted = a.new_zeros(len(block), 1), torch.zeros_like(block)
            for number, (tile, e) in enumerate(zip(table.split(_COLUMNS), strip.split(_COLUMNS, dim=1), strict=True)):
                torch.mm(scaled, tile.T, out=e).exp_()  # exp(50) at most
                e.diagonal(start - number * _COLUMNS).mul_(itself)
                sums += e.sum(1, keepdim=True)
                if wanted:
                    weighted.addmm_(e, tile)
            total += ((times * sums).log() - own[start : start + rows]).sum()
            if wanted:
                grad[start : start + len(block)] += weighted / sums
                grad.addmm_(strip.T, block / sums)
        if wanted:
            grad[: len(a)] -= targets
            grad[-len(a) :] -= a
            ctx.save_for_backward(grad.div_(len(a) * temperature))
        return total / len(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = ctx.saved_tensors
        of_a, *of_b = (gradients[0] * grad).split(ctx.n)
        return of_a, of_b[0] if of_b else None, None
