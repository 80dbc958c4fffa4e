"""Arrays on disk: safetensors (no pickle), written atomically, with a JSON state beside the arrays in the same file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ckd_fed.errors import DataError
from ckd_fed.files import write_atomically


def save_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any], *, private: bool = False) -> None:
    """Write arrays and a JSON-able state as one file; a reader sees the old file or the new one, never a mixture.

    Args:
        path: of the file.
        arrays: by name.
        state: beside them.
        private: for its owner alone, see :func:`~ckd_fed.files.write_atomically`.
    """
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    write_atomically(path, save(contiguous, metadata={"state": json.dumps(state)}), private=private)


def load_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    return _read(path, arrays=True)


def load_state(path: Path) -> dict[str, Any]:
    """Only the JSON state of a checkpoint, without reading its arrays; raises like :func:`load_checkpoint`."""
    return _read(path, arrays=False)[1]


def _read(path: Path, *, arrays: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys() if arrays else ()
            return {name: file.get_tensor(name) for name in names}, json.loads((file.metadata() or {})["state"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"checkpoint {path} is damaged: {error}") from None


def to_arrays(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors on the CPU as arrays, their names prefixed."""
    return {prefix + name: tensor.numpy() for name, tensor in tensors.items()}


def to_tensors(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Tensor]:
    """The arrays whose names start with the prefix, as tensors under the rest of their names."""
    return {name[len(prefix) :]: torch.from_numpy(np.array(array)) for name, array in arrays.items() if name.startswith(prefix)}
