"""The compiled kernels as functions of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ckd_fed.kernels.build import built

if TYPE_CHECKING:
    from ckd_fed.backbones.inverted import Inverted
    from ckd_fed.data.interactions import Interactions

_POINTER, _INT, _FLOAT, _DOUBLE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_uint
_TEAM = (_POINTER, _POINTER, _COUNT)
_SIGNATURES: dict[str, list[type]] = {
    "ckd_adam": [*[_POINTER] * 4, _INT, _INT, _POINTER, *[_DOUBLE] * 5, *_TEAM],
    "ckd_margins": [_POINTER, _INT, _POINTER, _INT, _INT, *[_POINTER] * 3, _INT, _INT, *[_POINTER] * 3, *_TEAM],
    "ckd_drift": [*[_POINTER] * 3, _INT, _POINTER, *[_INT] * 3, *[_POINTER] * 3, _INT, _POINTER, _POINTER, *_TEAM],
    "ckd_gradient": [_POINTER, _POINTER, _INT, *[_POINTER] * 4, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER, _FLOAT, _POINTER, *_TEAM],
    "ckd_linear": [*[_POINTER] * 4, *[_INT] * 3, _POINTER, ctypes.c_int, ctypes.c_int, *_TEAM],
    "ckd_narrow": [],
    "ckd_linear_gradient": [*[_POINTER] * 3, *[_INT] * 3, ctypes.c_int, _POINTER, *_TEAM],
    "ckd_distil": [_POINTER, *_TEAM],
    "ckd_distinct": [_POINTER, _INT, _INT, _POINTER, _POINTER],
    "ckd_invert": [_POINTER, _INT, _INT, *[_POINTER] * 3],
    "ckd_triples": [ctypes.c_uint64, _POINTER, _POINTER, _INT, _POINTER, *[_INT] * 3, _POINTER, _POINTER],
}
_NARROW: dict[str, list[type]] = {  # where the processor multiplies bfloat16
    "ckd_linear_narrow": [*[_POINTER] * 4, *[_INT] * 3, _POINTER, ctypes.c_int, ctypes.c_int, _POINTER, *_TEAM],
    "ckd_linear_gradient_narrow": [*[_POINTER] * 3, *[_INT] * 3, ctypes.c_int, _POINTER, *_TEAM],
}
_RESULTS = {"ckd_distinct": _INT, **dict.fromkeys(("ckd_invert", "ckd_margins", "ckd_narrow", "ckd_triples"), ctypes.c_int)}
_TRIPLES = 128  # whose squares are one number
_GROUPS = 16  # of rows, of each of which a linear layer's gradient is summed on its own
_SAMPLES = 256  # or pairs, whose distillation losses are one number


class _Step(ctypes.Structure):
    """``struct step`` of distil.c."""

    _fields_: ClassVar = [
        *((name, _INT) for name in ("m", "b", "k")),
        *((name, _FLOAT) for name in ("rho", "kappa", "temperature")),
        *((name, ctypes.c_int) for name in ("reweight", "specific", "generic")),
        *((name, _POINTER) for name in ("joint", "without", "only", "taught", "only_pairs", "taught_pairs", "asked", "asked_pairs")),
        *((name, _POINTER) for name in ("margin", "h", "effect", "weight", "slope", "slope_pairs", "g", "per_sample", "kd", "sums")),
    ]


class Taught(NamedTuple):
    """What distillation makes of a step, of M modalities, B samples and K pairs.

    Attributes:
        kd: the loss, scalar.
        per_sample: ``(B,)``.
        margin, specific, effect, weight: ``(M, B)``.
        generic: ``(M,)``.
        slopes: derivatives of the loss by the margins of each modality's samples, then by those of its pairs: ``(M * B + M * K,)``.
    """

    kd: Tensor
    per_sample: Tensor
    margin: Tensor
    specific: Tensor
    effect: Tensor
    weight: Tensor
    generic: Tensor
    slopes: Tensor


def check_rows(index: Tensor, n: int) -> None:
    """See that an index on the CPU is of rows of a table of n.

    Raises:
        IndexError: it is not.
    """
    numbers = index.numpy()
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < n:
        raise IndexError(f"rows from {numbers.min()} to {numbers.max()} are read of a table that has {n}")


class Kernels:
    """Functions of contiguous tensors on the CPU: tables of float32, rows of them in int64.

    Args:
        library: as compiled.

    Attributes:
        bfloat16: whether linear layers take inputs of that type: the processor multiplies them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.bfloat16 = bool(library.ckd_narrow())
        for name, arguments in {**_SIGNATURES, **(_NARROW if self.bfloat16 else {})}.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
        self._team = _team()

    def margins(self, users: Tensor, items: Tensor, user: Tensor, first: Tensor, second: Tensor, ranked: int = 0) -> tuple[Tensor, Tensor]:
        """Margins of triples, and the sum of squares of all rows that the first of them read.

        Args:
            users, items: tables, ``(n_users, d)`` and ``(n_items, d)``.
            user, first, second: rows of each triple, ``(n,)``.
            ranked: how many triples have their squares added up.

        Returns:
            ``users[user] . (items[first] - items[second])``, ``(n,)``; the sum, scalar.

        Raises:
            IndexError: a row is not in its table.
        """
        n = len(user)
        margin, squares, total = users.new_empty(n), torch.empty(-(-ranked // _TRIPLES), dtype=torch.double), users.new_empty(())
        rows = user.data_ptr(), first.data_ptr(), second.data_ptr(), n, ranked
        to = margin.data_ptr(), squares.data_ptr(), total.data_ptr(), *self._team, torch.get_num_threads()
        if self._library.ckd_margins(users.data_ptr(), len(users), items.data_ptr(), len(items), users.shape[1], *rows, *to):
            for index, table in ((user, users), (first, items), (second, items)):
                check_rows(index, len(table))
        return margin, total

    def users_gradient(
        self, users: Tensor, items: Tensor, bags: Inverted, first: Tensor, second: Tensor, margin: Tensor, ranked: int, squares: float
    ) -> Tensor:
        """Gradient of the users' rows that have a bag, ``(number of bags, d)``.

        Args:
            users, items, first, second, ranked: as of :meth:`margins`.
            bags: the triples by their users.
            margin: gradient of the margins, ``(n,)``.
            squares: gradient of the squares' sum.
        """
        return self._gradient(users, items, bags, first, second, len(margin), ranked, margin, squares)

    def items_gradient(self, users: Tensor, items: Tensor, bags: Inverted, user: Tensor, margin: Tensor, ranked: int, squares: float) -> Tensor:
        """As :meth:`users_gradient` of the items' rows; ``bags`` are of all first items and then all second ones."""
        return self._gradient(items, users, bags, user, None, len(margin), ranked, margin, squares)

    def _gradient(
        self, table: Tensor, other: Tensor, bags: Inverted, plus: Tensor, minus: Tensor | None, n: int, ranked: int, margin: Tensor, squares: float
    ) -> Tensor:
        found = table.new_empty((len(bags.starts) - 1, table.shape[1]))
        index = (None if of is None else of.data_ptr() for of in (bags.rows, bags.starts, bags.places, bags.bags))
        of_triples = plus.data_ptr(), None if minus is None else minus.data_ptr(), n, ranked, margin.data_ptr(), 2 * squares
        to = found.data_ptr(), *self._team, torch.get_num_threads()
        self._library.ckd_gradient(table.data_ptr(), other.data_ptr(), table.shape[1], *index, len(found), *of_triples, *to)
        return found

    def triples(self, base: int, train: Interactions, b: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Triples of a step as :class:`~ckd_fed.data.triples.TripleStream` draws them.

        Args:
            base: the step's key.
            train: some users have items, none all of them.
            b, k: triples of the ranking and of the distillation batch.

        Returns:
            ``(3, b)`` and ``(3, k)`` int32.

        Raises:
            MemoryError: there is not enough.
        """
        ranking, distillation = np.empty((3, b), dtype=np.int32), np.empty((3, k), dtype=np.int32)
        indptr, items, pool, *to = (array.ctypes.data for array in (train.indptr, train.items, train.users, ranking, distillation))
        if self._library.ckd_triples(base, indptr, items, train.n_items, pool, len(train.users), b, k, *to):
            raise MemoryError(f"there is not enough memory to draw {max(b, k):,} of {len(train.users):,} users")
        return ranking, distillation

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None = None, *, packed: bool = False) -> Tensor:
        """A linear layer on all rows, or on some that are gathered afterwards.

        Args:
            inputs: ``(n, inner)``; in bfloat16, to which the weight is then rounded, only where :attr:`bfloat16` is and inner is a multiple of 16.
            weight: ``(d, inner)``, d a multiple of 16.
            bias: ``(d,)``.
            rows: whose outputs are wanted, ``(k,)``; None for all.
            packed: whether to give these alone, one behind the other.

        Returns:
            ``inputs @ weight.T + bias``, ``(n, d)``, of which rows that are not wanted are whatever was in the memory; packed ``(k, d)``.
        """
        rows, past = torch.arange(len(inputs)) if rows is None else rows, rows is not None
        outputs, turned = weight.new_empty((len(rows) if packed else len(inputs), len(weight))), weight.t().contiguous()
        pointers = [tensor.data_ptr() for tensor in (inputs, turned, bias, rows, outputs)]
        given, team = (*pointers[:4], len(rows), *weight.T.shape, pointers[4], packed, past), (*self._team, torch.get_num_threads())
        if inputs.dtype == torch.bfloat16:
            memory = weight.new_empty(weight.numel() // 2)
            self._library.ckd_linear_narrow(*given, memory.data_ptr(), *team)
        else:
            self._library.ckd_linear(*given, *team)
        return outputs

    def linear_gradient(self, inputs: Tensor, outputs: Tensor, rows: Tensor | None = None, *, packed: bool = False) -> tuple[Tensor, Tensor]:
        """Gradients of a linear layer's weight ``(d, inner)`` and bias ``(d,)``, both dimensions multiples of 16.

        Args:
            inputs: as of :meth:`linear`; with bfloat16, to which the gradient is then rounded for the weight, both dimensions are at most 512.
            outputs: gradient of the outputs, ``(n, d)``, packed ``(k, d)``.
            rows, packed: as of :meth:`linear`; the gradient of other rows is not read.
        """
        inner, d = inputs.shape[1], outputs.shape[1]
        rows = torch.arange(len(inputs)) if rows is None else rows
        sums = outputs.new_empty((_GROUPS, d * (inner + 1)))
        pointers = [tensor.data_ptr() for tensor in (inputs, outputs, rows, sums)]
        compute = self._library.ckd_linear_gradient_narrow if inputs.dtype == torch.bfloat16 else self._library.ckd_linear_gradient
        compute(*pointers[:3], len(rows), inner, d, packed, pointers[3], *self._team, torch.get_num_threads())
        weight, bias = sums[0].split([d * inner, d])
        return weight.view(d, inner), bias

    def distinct(self, index: Tensor, n: int) -> Tensor:
        """The distinct numbers of an index ``(k,)``, ascending. Takes as long as a pass over n bytes.

        Raises:
            IndexError: one is not below n.
        """
        found, seen = torch.empty(n, dtype=torch.long), torch.zeros(n, dtype=torch.int8)
        count = self._library.ckd_distinct(index.data_ptr(), len(index), n, seen.data_ptr(), found.data_ptr())
        if count < 0:
            check_rows(index, n)
        return found[:count]

    def adam(
        self,
        parameter: Tensor,
        gradient: Tensor,
        moments: tuple[Tensor, Tensor],
        step: float,
        rate: float,
        betas: tuple[float, float],
        eps: float,
        rows: Tensor | None = None,
    ) -> None:
        """Adam's update, in place.

        Args:
            parameter, gradient: of any shape; of a table's rows the gradient is ``(n, d)``.
            moments: exponential averages of the gradient and of its square.
            step: number of the update, from 1.
            rate, betas, eps: of Adam.
            rows: which alone are moved, each once, ``(n,)``; None for all.
        """
        pointers = [tensor.data_ptr() for tensor in (parameter, gradient, *moments)]
        which = (parameter.numel(), 0, None) if rows is None else (len(rows), parameter.shape[1], rows.data_ptr())
        self._library.ckd_adam(*pointers, *which, rate, *betas, eps, step, *self._team, torch.get_num_threads())

    def drift(
        self,
        tables: tuple[Tensor, Tensor, Tensor],
        last: Tensor,
        first: int,
        step: int,
        nodes: np.ndarray,
        products: np.ndarray,
        kept: tuple[np.ndarray, np.ndarray],
        rows: Tensor | None = None,
    ) -> None:
        """What Adam does to rows in the steps that they missed, in place; see :mod:`ckd_fed.training.drift`.

        Args:
            tables: a parameter and its moments, ``(n, d)``.
            last: the step after which each row is as it stands, ``(n,)`` int64, from first to step; then ``step``.
            first, step: the first step of which there are nodes, and the last one that was taken.
            nodes, products: x times epsilon and w x of each step from the first on, ``(steps, 4 or 6)`` float32.
            kept: what k steps leave of each moment, by k, ``(steps,)`` float32.
            rows: which alone are moved, each once, ``(k,)``; None for all.
        """
        pointers = [table.data_ptr() for table in tables]
        which = (None, len(tables[0])) if rows is None else (rows.data_ptr(), len(rows))
        known = nodes.ctypes.data, products.ctypes.data, nodes.shape[1], *(of.ctypes.data for of in kept)
        to = first, step, last.data_ptr(), *known, *self._team, torch.get_num_threads()
        self._library.ckd_drift(*pointers, tables[0].shape[1], *which, *to)

    def distil(
        self,
        joint: Tensor,
        samples: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
        pairs: tuple[Sequence[Tensor], Sequence[Tensor]],
        masks: tuple[Sequence[Tensor | None], Sequence[Tensor | None]],
        strengths: tuple[float, float, float],
        switches: tuple[bool, bool, bool],
    ) -> Taught:
        """The distillation loss, its parts and its derivatives.

        Args:
            joint: margins of the joint view, ``(B,)``, B > 0.
            samples: margins of ``without m``, of ``only m`` and of the teacher, each of every modality, ``(B,)``.
            pairs: margins of ``only m`` and of the teacher, each of every modality, ``(K,)``, K > 0.
            masks: which samples and which pairs the teacher of every modality was asked about, bool; None for all.
            strengths: rho, kappa and temperature.
            switches: whether samples are reweighted, and which losses count, the specific and the generic one.

        Raises:
            ValueError: some are not of as many samples or pairs as the others.
        """
        m, b, k = len(samples[0]), len(joint), len(pairs[0][0])
        for n, margins in ((b, (*samples, masks[0])), (k, (*pairs, masks[1]))):
            for each in margins:
                if len(each) != m or any(tensor is not None and tensor.shape != (n,) for tensor in each):
                    shapes = ", ".join("none" if tensor is None else str(tuple(tensor.shape)) for tensor in each)
                    raise ValueError(f"margins of {m} modalities and {n} triples have the shapes {shapes}")
        sizes = [*[m * b] * 4, m * (b + k), m, b]
        numbers, kd = joint.new_empty(sum(sizes)), joint.new_empty(())
        margin, specific, effect, weight, slopes, generic, per_sample = numbers.split(sizes)
        sums = torch.empty(m * -(-k // _SAMPLES) + (m + 1) * -(-b // _SAMPLES), dtype=torch.double)
        lists = [_pointers(tensors) for tensors in (*samples, *pairs, *masks)]
        of_pairs = slopes.data_ptr() + m * b * slopes.element_size()
        parts = [of.data_ptr() for of in (margin, specific, effect, weight, slopes)]
        to = *parts, of_pairs, *(of.data_ptr() for of in (generic, per_sample, kd, sums))
        step = _Step(m, b, k, *strengths, *switches, joint.data_ptr(), *map(ctypes.addressof, lists), *to)
        self._library.ckd_distil(ctypes.byref(step), *self._team, torch.get_num_threads())
        return Taught(kd, per_sample, margin.view(m, b), specific.view(m, b), effect.view(m, b), weight.view(m, b), generic, slopes)

    def inverted(self, index: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The places of an index ``(k,)`` in ascending order of the rows that they name; these rows; and where the places of each of n rows start,
        ``(n + 1,)``.

        Raises:
            IndexError: a row is not among the n.
        """
        places, rows, starts = torch.empty_like(index), torch.empty_like(index), torch.empty(n + 1, dtype=torch.long)
        if self._library.ckd_invert(index.data_ptr(), len(index), n, places.data_ptr(), rows.data_ptr(), starts.data_ptr()):
            check_rows(index, n)
        return places, rows, starts


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (_POINTER * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


@cache
def kernels() -> Kernels | None:
    """What this machine compiled; None where it could not."""
    library = built().library
    return None if library is None else Kernels(library)


def _team() -> tuple[int | None, int | None]:
    """The functions by which torch's own OpenMP starts and tells threads: those of a second OpenMP would fight with torch's for the cores.

    None where torch has another kind of threads; kernels then run on one.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return None, None
    return ctypes.cast(start, ctypes.c_void_p).value, ctypes.cast(number, ctypes.c_void_p).value
