"""Frozen item graphs on disk, for processes that do not live long enough to search for nearest items again: one file a graph.

Under Flower every message of a deployment is handled by a fresh process, and the search takes minutes where items are many. Whoever builds
a backbone says where graphs are kept; where nobody does, nothing is read or written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from ckd_fed.checkpoint import load_checkpoint, save_checkpoint, to_arrays
from ckd_fed.errors import DataError

_FILES = 32  # of a folder; those used longest ago go first
_folder: ContextVar[Path | None] = ContextVar("folder of kept graphs", default=None)


@contextmanager
def graphs_kept_in(folder: Path | None) -> Iterator[None]:
    """Keep graphs that are built within the context in a folder; None keeps none."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def load_graph(name: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A graph's neighbours and weights, or None where it is not kept, or its file is damaged or holds something else.

    Args:
        name: it was kept under; says all that the graph depends on.
        shape: (n_items, K).
        dtype: of the weights.
    """
    path = _path(name)
    if path is None:
        return None
    try:
        arrays, state = load_checkpoint(path)
        index, weight = (torch.from_numpy(arrays[part]) for part in ("index", "weight"))
    except (DataError, KeyError, TypeError):
        return None
    if (index.shape, weight.shape, index.dtype, weight.dtype) != (shape, shape, torch.long, dtype):
        return None
    if state != _state(name, index, weight) or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < shape[0]):
        return None
    with suppress(OSError):
        os.utime(path)
    return index, weight


def save_graph(name: str, index: Tensor, weight: Tensor) -> None:
    """Keep a graph. A disk that is full or may not be written to keeps none, which is no reason to stop."""
    path = _path(name)
    if path is None:
        return
    with suppress(OSError):
        save_checkpoint(path, to_arrays({"index": index, "weight": weight}), _state(name, index, weight))
        others = sorted((other.stat().st_mtime_ns, other) for other in path.parent.glob("*.safetensors") if other != path)
        for _, other in others[: max(0, len(others) + 1 - _FILES)]:
            other.unlink(missing_ok=True)


def _path(name: str) -> Path | None:
    folder = _folder.get()
    return folder / f"{name}.safetensors" if folder else None


def _state(name: str, index: Tensor, weight: Tensor) -> dict[str, str]:
    content = hashlib.sha256(index.numpy().tobytes())
    content.update(weight.numpy().tobytes())
    return {"graph": name, "sha256": content.hexdigest()}
