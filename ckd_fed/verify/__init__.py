"""Recompute every number of a published reference file with this implementation, in float64.

Two kinds of files (``tests/reference/README.md`` gives their layouts), of any sizes and seeds:

- one whole distillation step of CKD as the authors' code computes it (``vbpr.npz``, ``mmgcn.npz``): :mod:`ckd_fed.verify.step`;
- a backbone as its own authors' code computes it: embeddings, intermediates, losses, gradients, options, and the views with an
  absent modality: the module of this package that bears the backbone's name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ckd_fed.errors import DataError
from ckd_fed.verify.reference import Reference, relative_error

__all__ = ["TOLERANCE", "Reference", "relative_error", "report", "verify"]

TOLERANCE = 1e-9

# Which kind of file it is: an array that only such a file has -> the module that verifies it.
_KINDS = {
    "input.interactions": "step",
    "param/modal_weight": "lattice",
    "param/query.0.weight": "micro",
    "param/predictor.weight": "bm3",
    "hp/mm_image_weight": "freedom",
    "param/query_common.0.weight": "mgcn",
    "param/model_specific_conf": "grcn",
    "param/id_gcn_real.id_embedding": "egogcn",
}
_RESULTS = ("graph/", "mid/", "out/", "loss/", "grad", "variant/", "cf", "param_after_forward/")


def verify(path: Path) -> dict[str, float]:
    """Largest relative error of each group of numbers.

    The error of an array is the largest absolute difference divided by the largest magnitude in the reference array.

    Returns:
        Group (for example ``"embeddings joint"``, ``"gradients"``) -> error; NaN counts as infinite.

    Raises:
        DataError: the file is missing, unreadable, or lacks a number of the layout.
    """
    return _verify(path).errors


def _verify(path: Path) -> Reference:
    reference = Reference.read(path)
    kind = next((module for name, module in _KINDS.items() if name in reference), None)
    if kind is None:
        raise DataError(
            f"{path} lacks 'input.interactions' and is no backbone's file either; it is not a reference file of a layout in tests/reference/README.md"
        )
    try:
        import_module(f"ckd_fed.verify.{kind}").check(reference)
    except KeyError as error:
        raise DataError(f"{path} lacks {error.args[0]!r}; it is not a reference file of the layout in tests/reference/README.md") from None
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise DataError(f"{path} is inconsistent: {' '.join(str(error).split())}") from None
    return reference


def report(path: Path, write: Callable[[str], None]) -> bool:
    """Verify one file, write a line per group, and say whether all errors are under :data:`TOLERANCE`."""
    reference = _verify(path)
    write(f"{path}")
    for group, error in reference.errors.items():
        write(f"  {group:<24} {error:10.2e}  {'ok' if error < TOLERANCE else 'TOO LARGE'}")
    left = reference.unchecked(_RESULTS)
    if left:
        write(f"  not recomputed: {len(left)} arrays ({', '.join(left[:6])}{', …' if len(left) > 6 else ''})")
    passed = all(error < TOLERANCE for error in reference.errors.values())
    write(f"  {'all under' if passed else 'NOT all under'} {TOLERANCE:.0e}")
    return passed
