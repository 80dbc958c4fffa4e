"""Sparse matrices out of pickles, executing nothing.

A pickle is a program. Here it is only read: :mod:`pickletools` lists its opcodes and a small machine lays down what they describe as inert
records, calling no constructor, no ``__setstate__`` and no function that the file names. Only then are records of the exact shape that
numpy and scipy give their arrays and sparse matrices turned into arrays. Any other name is refused.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from ckd_fed.errors import DataError

_ARRAY = {f"{m} _reconstruct" for m in ("numpy.core.multiarray", "numpy._core.multiarray")}
_BUFFER = {f"{m} _frombuffer" for m in ("numpy.core.numeric", "numpy._core.numeric")}
_SCALAR = {f"{m} scalar" for m in ("numpy.core.multiarray", "numpy._core.multiarray")}
_MODULES = ("scipy.sparse", *(f"scipy.sparse.{layout}" for layout in ("csr", "csc", "coo", "_csr", "_csc", "_coo")))
_MATRIX = {
    f"{module} {layout}_{kind}": layout
    for module in _MODULES
    for layout in ("csr", "csc", "coo")
    for kind in ("matrix", "array")
    if module == "scipy.sparse" or module.endswith(layout)
}
_OTHER = {
    "copy_reg _reconstructor",
    "copyreg _reconstructor",
    "__builtin__ object",
    "builtins object",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
}
_NAMES = _ARRAY | _BUFFER | _SCALAR | set(_MATRIX) | _OTHER
_PLAIN = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LONGEST = 10**8  # users or items: a forged shape must not make us allocate


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names, as text."""

    text: str


@dataclass
class _Record:
    """What the pickle would have called, with which arguments, and the state it would have set."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Refused(Exception):
    """Why a pickle is not read."""


_MARK = object()


def read_sparse_pickle(path: Path) -> sparse.csr_matrix:
    """The sparse matrix in a pickle file.

    Returns:
        A CSR matrix of float64; of its entries only which are not zero is of interest.

    Raises:
        DataError: the pickle names anything but numpy arrays and scipy's csr, csc and coo matrices, or is damaged. The message gives
            the conversion to run where the file is trusted.
    """
    try:
        return _matrix(_load(path.read_bytes()))
    except _Refused as refusal:
        reason = str(refusal)
    except Exception as error:  # of hostile bytes anything may come; nothing of them has been executed
        reason = f"it is damaged ({type(error).__name__})"
    raise DataError(
        f"{path} is not read: {reason}. Pickles are never executed here; if you trust it, convert it with: python -c "
        f"\"import pickle, scipy.sparse as s; s.save_npz('{path.name}.npz', s.csr_matrix(pickle.load(open('{path.name}', 'rb'))))\""
    )


def _load(data: bytes) -> Any:
    """The value a pickle describes, of plain values, names and records."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME"):
            _step(name, argument, stack)
    raise _Refused("it has no end")


def _step(name: str, argument: Any, stack: list[Any]) -> None:
    """Opcodes that build something out of the stack."""
    if name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_TUPLE":
        stack.append(())
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        n = int(name[-1])
        stack[-n:] = [tuple(stack[-n:])]
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name == "DICT":
        entries = _to_mark(stack)
        stack.append(dict(zip(entries[::2], entries[1::2], strict=True)))
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
    elif name == "SETITEMS":
        entries = _to_mark(stack)
        stack[-1].update(zip(entries[::2], entries[1::2], strict=True))
    elif name == "GLOBAL":
        stack.append(_named(argument))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_named(f"{module} {attribute}"))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, called = stack.pop(), stack.pop()
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise _Refused("it calls something that is no name")
        stack.append(_Record(called.text, arguments))
    elif name == "BUILD":
        state = stack.pop()
        if not isinstance(stack[-1], _Record):
            raise _Refused("it sets the state of something that is no object")
        stack[-1].state = state
    else:
        raise _Refused(f"it uses the opcode {name}, which no array or sparse matrix needs")


def _to_mark(stack: list[Any]) -> list[Any]:
    taken = []
    while (top := stack.pop()) is not _MARK:
        taken.append(top)
    return taken[::-1]


def _named(text: str) -> _Name:
    if text not in _NAMES:
        raise _Refused(f"it names {ascii(text.replace(' ', '.'))[:80]}, which is no numpy array and no csr, csc or coo matrix of scipy")
    return _Name(text)


def _matrix(record: Any) -> sparse.csr_matrix:
    if isinstance(record, _Record) and record.name.endswith(" _reconstructor") and record.arguments and isinstance(record.arguments[0], _Name):
        record = _Record(record.arguments[0].text, (), record.state)
    if not isinstance(record, _Record) or record.name not in _MATRIX or not isinstance(record.state, dict):
        raise _Refused("it holds no csr, csc or coo matrix of scipy")
    layout, state = _MATRIX[record.name], record.state
    shape = tuple(_whole(length) for length in state["_shape"])
    if len(shape) != 2 or min(shape) < 0 or max(shape) > _LONGEST:
        raise _Refused(f"its matrix has the shape {shape}")
    data = _array(state["data"])
    if layout == "coo":
        row, column = (_array(a) for a in (state["coords"] if "coords" in state else (state["row"], state["col"])))
    else:
        indptr, indices = _array(state["indptr"]), _array(state["indices"])
        lines = shape[0] if layout == "csr" else shape[1]
        if indptr.shape != (lines + 1,) or indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] > len(indices):
            raise _Refused("its matrix is damaged: indptr does not fit")
        data, indices = data[: indptr[-1]], indices[: indptr[-1]]
        major = np.repeat(np.arange(lines), np.diff(indptr))
        row, column = (major, indices) if layout == "csr" else (indices, major)
    if not (data.shape == row.shape == column.shape and data.ndim == 1) or row.dtype.kind not in "iu" or column.dtype.kind not in "iu":
        raise _Refused("its matrix is damaged: data and indices do not fit each other")
    for index, limit in ((row, shape[0]), (column, shape[1])):
        if len(index) and (index.min() < 0 or index.max() >= limit):
            raise _Refused(f"its matrix is damaged: an index lies outside of the shape {shape}")
    return sparse.csr_matrix((data.astype(np.float64), (row.astype(np.int64), column.astype(np.int64))), shape=shape)


def _array(record: Any) -> np.ndarray:
    if not isinstance(record, _Record):
        raise _Refused("an array is missing")
    if record.name in _BUFFER:
        content, dtype, shape, _order = record.arguments
    elif record.name in _ARRAY:
        _version, shape, dtype, _fortran, content = record.state
    else:
        raise _Refused("an array is missing")
    if isinstance(content, _Record) and content.name == "_codecs encode":  # how Python 3 writes bytes in protocol 2
        text, coding = content.arguments
        if coding != "latin1" or not isinstance(text, str):
            raise _Refused("its bytes are encoded in an unknown way")
        content = text
    if isinstance(content, str):  # Python 2's bytes, or the above
        content = content.encode("latin1")
    array = np.frombuffer(content, dtype=_dtype(dtype))
    if len(shape) != 1 or _whole(shape[0]) != len(array):
        raise _Refused(f"an array claims the shape {shape} but holds {len(array)} numbers")
    return array


def _dtype(record: Any) -> np.dtype[Any]:
    if not isinstance(record, _Record) or record.name != "numpy dtype":
        raise _Refused("the type of an array is missing")
    code, order = record.arguments[0], record.state[1] if record.state else "="
    if not isinstance(code, str) or code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8") or order not in "<>=|":
        raise _Refused(f"an array holds {ascii(code)[:40]}, no numbers")
    return np.dtype(("<" if order in "=|" else order) + code)


def _whole(value: Any) -> int:
    """An int, or a numpy scalar as some scipy versions keep in a shape."""
    if isinstance(value, _Record) and value.name in _SCALAR:
        dtype, content = value.arguments
        if isinstance(content, _Record) and content.name == "_codecs encode":
            content = content.arguments[0]
        return int(np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype=_dtype(dtype))[0])
    if type(value) is not int:
        raise _Refused("a number is missing")
    return value
