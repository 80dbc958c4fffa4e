"""The hot path of a step on a CPU, compiled where the machine has a C compiler.

Wherever it has none, :func:`kernels` is None and torch's own operations do the same, slower and with other rounding.
"""

from ckd_fed.kernels.build import built, keep_in
from ckd_fed.kernels.compiled import Kernels, check_rows, kernels

__all__ = ["Kernels", "built", "check_rows", "keep_in", "kernels"]
