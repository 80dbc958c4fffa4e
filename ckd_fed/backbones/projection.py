"""Projected features: of all items, or of a step's, where features are wide.

A copy of the rows passes through memory four times. Here a block of them is gathered into the cache and multiplied there, and the backward
gathers it anew: for 5,600 of 7,050 rows of 4,096 numbers the two passes take 70 ms, over all rows with torch's own operations 92 (CPU, two threads).

Features may be held in a narrower type than the parameters: ``bfloat16`` beside ``float32``. A product then rounds its other factor, the weights
or the gradient, to that type, sums in float32 and, unless it is the compiled kernel's, rounds the result; parameters, their moments and all else stay
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd_fed.kernels import check_rows, kernels

BLOCK = 1 << 22  # bytes of a block of features
NARROW = 512  # inputs or outputs, at most, of a linear layer for the compiled kernel


def project(features: Tensor, linear: nn.Module, rows: Callable[[], Tensor] | None = None) -> Tensor:
    """``linear(features)``, with gradients for the linear layer alone.

    Args:
        features: ``(..., dimension)``, of the layer's type or a narrower one.
        linear: an ``nn.Linear`` with a bias.
        rows: gives the only ones that are read, of features ``(n, dimension)``, ascending and each once,
            ``(k,)`` int64. Called on a CPU, where that saves work.

    Returns:
        ``(..., linear.out_features)``, of the layer's type. Rows that nobody reads may be anything, and may have no gradient but 0.
    """
    assert isinstance(linear, nn.Linear)
    if narrow(features, linear):
        product: Tensor = _Narrow.apply(features, linear.weight, linear.bias, rows and rows(), False)
        return product
    if features.dtype == linear.weight.dtype:
        projected: Tensor = linear(features)
        return projected
    return F.linear(features, linear.weight.to(features.dtype)).to(linear.weight.dtype).add_(linear.bias)


def narrow(features: Tensor, linear: nn.Module) -> bool:
    """Whether the compiled kernel is for these: where outputs are few and inputs not many a general product is no faster.

    It reads rows where they are, so that some cost what they are of all.
    """
    assert isinstance(linear, nn.Linear)
    (d, inner), compiled = linear.weight.shape, kernels()
    if compiled is None or features.dim() != 2 or inner > NARROW or d > NARROW or d % 16 or inner % 16:
        return False
    if features.dtype != torch.float32 and not (features.dtype == torch.bfloat16 and compiled.bfloat16):
        return False
    return linear.weight.dtype == torch.float32 and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (features, linear.weight)
    )


class _Narrow(torch.autograd.Function):
    """Of the rows, or of all without any; packed: one behind the other, or each at its place."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, packed: bool) -> Tensor:
        compiled = kernels()
        assert compiled is not None
        ctx.save_for_backward(features, rows)
        ctx.packed = packed
        return compiled.linear(features, weight, bias, rows, packed=packed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outputs: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        compiled = kernels()
        assert compiled is not None
        features, rows = ctx.saved_tensors
        return None, *compiled.linear_gradient(features, outputs.contiguous(), rows, packed=ctx.packed), None, None


def pays(features: Tensor, n: int) -> bool:
    """Whether :func:`project_rows` is the faster way to n rows of the features: on a CPU, where they are more than a block.

    Features that are one block all in all stay in the cache as they are; gathering some of them costs more than projecting all.
    """
    if features.device.type != "cpu":
        return False
    return min(n * features.shape[1], features.numel()) * features.element_size() > BLOCK


def project_rows(features: Tensor, index: Tensor, linear: nn.Module) -> Tensor:
    """``linear(features[index])``, with gradients for the linear layer alone.

    Args:
        features: ``(n, dimension)``, of the layer's type or a narrower one.
        index: ``(k,)`` int64.
        linear: an ``nn.Linear`` with a bias.

    Returns:
        ``(k, linear.out_features)``, of the layer's type.

    Raises:
        IndexError: a row is not among the features.
    """
    assert isinstance(linear, nn.Linear)
    if narrow(features, linear):
        check_rows(index, len(features))
        product: Tensor = _Narrow.apply(features, linear.weight, linear.bias, index.contiguous(), True)
        return product
    rows: Tensor = _ProjectRows.apply(features, index, linear.weight, linear.bias)
    return rows


def _blocks(features: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Positions in the index, and the features of these rows, in one memory that every block overwrites."""
    n = max(1, min(len(index), BLOCK // max(1, features.shape[1] * features.element_size())))
    memory = features.new_empty((n, features.shape[1]))
    for start in range(0, len(index), n):
        part = index[start : start + n]
        yield slice(start, start + len(part)), torch.index_select(features, 0, part, out=memory[: len(part)])


class _ProjectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(features, index)
        rows = weight.new_empty((len(index), len(weight)))
        factor = weight.to(features.dtype).T
        for where, block in _blocks(features, index):
            if factor.dtype == rows.dtype:
                torch.addmm(bias, block, factor, out=rows[where])
            else:
                torch.add(block @ factor, bias, out=rows[where])
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, rows: Tensor) -> tuple[None, None, Tensor, Tensor]:
        features, index = ctx.saved_tensors
        bias = rows.sum(0)
        # Each type has a way round in which its product is a tenth faster.
        if rows.dtype == features.dtype:
            transposed = rows.new_zeros((features.shape[1], rows.shape[1]))
            for where, block in _blocks(features, index):
                transposed.addmm_(block.T, rows[where])
            return None, None, transposed.T, bias
        weight, narrow = rows.new_zeros((rows.shape[1], features.shape[1])), rows.to(features.dtype)
        for where, block in _blocks(features, index):
            weight += narrow[where].T @ block
        return None, None, weight, bias
