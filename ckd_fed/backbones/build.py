"""Build a backbone by its name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch

from ckd_fed.backbones import backbone_target
from ckd_fed.backbones.base import Backbone
from ckd_fed.data.dataset import check_modality
from ckd_fed.data.interactions import Interactions
from ckd_fed.errors import ConfigError, unknown


def backbone_class(name: str) -> type[Backbone]:
    """The class behind a backbone's name or ``module:Class``.

    Raises:
        ConfigError: unknown name (the message lists the choices), or a module or class that is not there or is no backbone.
    """
    module, _, attribute = backbone_target(name).partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backbone {name!r} cannot be imported: {error}; its module must be importable on every node") from None
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise ConfigError(f"backbone {name!r} is {found!r}, which is no subclass of ckd_fed.backbones.base.Backbone")
    return found


def importable(name: str) -> bool:
    """Whether the module of a backbone can be imported on this machine; one of one's own may be on the nodes only.

    Raises:
        ConfigError: unknown name.
    """
    module, _, _ = backbone_target(name).partition(":")
    try:
        import_module(module)
    except Exception:  # a module of one's own may raise anything
        return False
    return True


def options_of(name: str) -> dict[str, Parameter]:
    """What a backbone's constructor takes by keyword only, but for ``present``, which is no option."""
    parameters = signature(backbone_class(name)).parameters.values()
    return {one.name: one for one in parameters if one.kind is Parameter.KEYWORD_ONLY and one.name != "present"}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check a backbone's options as far as that goes without building it: names, types and signs.

    Args:
        name: of the backbone.
        options: its own options, hyphenated or with underscores.

    Raises:
        ConfigError: unknown backbone or option, or a value that the option cannot have; the message names the key and the choices.
    """
    known = options_of(name)
    for option, value in options.items():
        parameter = known.get(option.replace("-", "_"))
        if parameter is None:
            raise ConfigError(unknown(f"option of backbone {name}", option.replace("_", "-"), (one.replace("_", "-") for one in known)))
        _check_option(f"model.{option.replace('_', '-')}", value, type(parameter.default))


def build_backbone(
    name: str,
    train: Interactions,
    features: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
    *,
    seed: int,
    masks: Mapping[str, np.ndarray] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    feature_dtype: torch.dtype | None = None,
) -> Backbone:
    """Build a backbone with freshly drawn parameters.

    Args:
        name: of the backbone.
        train: training interactions.
        features: modality -> ``(n_items, dimension)``; one modality makes a teacher. Read-only arrays are used in place, others copied.
        options: the backbone's own options, for example ``embedding_dim``; hyphens do as well.
        masks: modality -> which items have it, ``(n_items,)`` bool; handed on to a backbone whose constructor has ``present``, for each modality
            that some items lack.
        seed: of the initialisation. Parameters are drawn on the CPU, so every device starts from the same ones.
        device, dtype: where and in what precision it lives.
        feature_dtype: type in which the features are held, ``dtype`` or a narrower one; None for ``dtype``.

    Raises:
        ConfigError: unknown backbone or option, or a type of features that the backbone cannot do with.
        DataError: a modality's name cannot be used.
    """
    build = backbone_class(name)
    held = dtype if feature_dtype is None else feature_dtype
    if held != dtype and not build.projects_features:
        held_in = str(held).removeprefix("torch.")
        raise ConfigError(f"training.feature-dtype is {held_in!r}, but {name!r} does more with its features than project them; use 'float32'")
    check_options(name, options)
    given = {option.replace("-", "_"): value for option, value in options.items()}
    for modality in features:
        check_modality(modality)
    tensors = {m: _tensor(x).to(dtype) for m, x in features.items()}
    if "present" in signature(build).parameters:
        lacking = {m: masks[m] for m in features if m in masks and not masks[m].all()} if masks else {}
        given["present"] = {m: torch.from_numpy(mask.copy()) for m, mask in lacking.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build(train, tensors, **given)
    backbone = backbone.to(dtype=dtype)
    if held != dtype:
        for modality in features:
            buffer = f"features_{modality}"
            backbone.register_buffer(buffer, backbone.get_buffer(buffer).to(held), persistent=False)
    return backbone.to(device=device)  # last: a GPU never holds the wide features


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.flags.writeable:
        return torch.from_numpy(np.array(array))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor does a backbone write to its features
        return torch.from_numpy(array)


def _check_option(key: str, value: Any, kind: type) -> None:
    """An option has its default's type; sizes are positive, weights are finite and not negative."""
    if kind is int and not (type(value) is int and value >= 1):
        raise ConfigError(f"{key} is {value!r}; a whole number of at least 1 is needed")
    if kind is float and not (type(value) in (int, float) and value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{key} is {value!r}; a finite number of at least 0 is needed")
    if kind is bool and type(value) is not bool:
        raise ConfigError(f"{key} is {value!r}; true or false is needed")
