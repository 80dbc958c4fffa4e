"""Sentence encoders: from the texts of items to text features."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import numpy as np

from ckd_fed.errors import DataError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"  # 384-d, the text features of the literature's Baby, Sports and Clothing

Encoder = Callable[[Sequence[str]], np.ndarray]


def find_encoder(name: str) -> Encoder:
    """An encoder by name.

    Args:
        name: a model of sentence-transformers (downloaded where it is not yet there) or the folder of a saved one, or ``module:function``
            for a function of one's own from texts to ``(n, dimension)``.

    Raises:
        DataError: sentence-transformers, an extra, is not installed, the model cannot be had, or the function is not there.
    """
    module, colon, function = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise DataError(
                f"the encoder {name!r} cannot be imported: {error}; a module of this folder is found with PYTHONPATH=. before the command"
            ) from None
        return found
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise DataError(
            f"the encoder {name!r} needs sentence-transformers; install it with pip install 'ckd_fed[encode]', give vectors computed elsewhere with "
            "--text-vectors FILE, or a function of your own with --encoder module:function"
        ) from None
    try:
        model = SentenceTransformer(name)
    except Exception as error:  # of whatever kind: the library's own, the hub's, the network's
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"the encoder {name!r} cannot be loaded: {reason}; name a model that this machine can download or the folder of one saved elsewhere, or "
            "give vectors computed elsewhere with --text-vectors FILE"
        ) from None
    return lambda texts: np.asarray(model.encode(list(texts), batch_size=64, show_progress_bar=True), dtype=np.float32)


def encode(encoder: Encoder, name: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Text features of items.

    Args:
        encoder: from :func:`find_encoder`.
        name: its name, for messages.
        texts: one an item, some of them not empty; an item without text lacks the modality.

    Returns:
        Features ``(n, dimension)`` float32, zero where there is no text, and mask ``(n,)`` bool.

    Raises:
        DataError: the encoder gives something else than one finite vector a text.
    """
    mask = np.array([bool(text) for text in texts])
    vectors = np.asarray(encoder([text for text in texts if text]))
    if vectors.ndim != 2 or len(vectors) != mask.sum() or vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
        raise DataError(f"the encoder {name!r} gave {vectors.dtype} of shape {vectors.shape}; {int(mask.sum())} finite rows of floats are needed")
    features = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
    features[mask] = vectors
    return features, mask
