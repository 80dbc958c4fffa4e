"""What a sweep runs: variants of a configuration, over datasets, backbones and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ckd_fed.config import configs_directory, flatten, read_recipe, read_yaml
from ckd_fed.errors import ConfigError, unknown
from ckd_fed.files import expanded


@dataclass(frozen=True)
class Recipe:
    """A sweep's recipe.

    Attributes:
        name: part of the runs' names.
        title: for people.
        variants: label -> overrides of the configuration; the first is what the others are compared with.
    """

    name: str
    title: str
    variants: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        run: its name, the same whenever the same sweep is asked for.
        dataset, backbone, seed, variant: what it is.
        overrides: of the configuration, complete.
    """

    run: str
    dataset: str
    backbone: str
    seed: int
    variant: str
    overrides: Mapping[str, Any] = field(compare=False)


def read_sweep(name: str) -> Recipe:
    """A sweep's recipe by the name of a file in ``configs/sweeps`` or in ``configs/recipes``, or by the path of a YAML file.

    A file holds ``title`` and ``variants`` (label -> overrides). A plain recipe becomes a sweep of two variants, without it and with it.

    Raises:
        ConfigError: no such recipe, or not of that form.
    """
    folder = configs_directory()
    path = expanded(name, "the sweep's recipe") if name.endswith((".yaml", ".yml")) else folder / "sweeps" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for part in ("sweeps", "recipes") for file in (folder / part).glob("*.yaml"))
        if name not in known:
            raise ConfigError(f"{unknown('sweep recipe', name, known)}; or name a YAML file")
        read_recipe(name)
        return Recipe(name, f"Recipe {name}", {"as configured": {}, name: {"recipe": name}})
    tree = read_yaml(path)
    variants = tree.get("variants") if isinstance(tree, dict) else None
    if not isinstance(variants, dict) or not variants or not all(isinstance(value, dict) for value in variants.values()):
        raise ConfigError(f"{path} needs `variants:`, a label with a mapping of configuration keys for each, for example `full: {{}}`")
    labels = {str(label): value for label, value in variants.items()}
    for label, value in labels.items():
        refuse_own_keys(f"{path}: variant {label!r}", flatten(value))
    slugs = [slug(label) for label in labels]
    if len(set(slugs)) != len(slugs) or not all(slugs):
        raise ConfigError(f"{path}: two variants come to the same run name ({', '.join(slugs)}); give them labels that differ in letters or digits")
    return Recipe(path.stem, str(tree.get("title", path.stem)), labels)


def refuse_own_keys(where: str, given: Mapping[str, Any]) -> None:
    """Refuse the keys that a sweep sets itself, which would be passed over or lead to another run's folder.

    Raises:
        ConfigError: there are some.
    """
    own = sorted({"dataset", "backbone", "seed", "name", "home", "resume"} & set(given))
    if own:
        raise ConfigError(
            f"{where} sets {', '.join(own)}; a sweep takes --dataset, --backbone and --seeds, names its runs itself, goes on with those that "
            "broke off, and uses $CKD_FED_HOME"
        )


def jobs(recipe: Recipe, datasets: Sequence[str], backbones: Sequence[str], seeds: Sequence[int], overrides: Mapping[str, Any]) -> list[Job]:
    """All runs of a sweep, all variants of a seed one after the other.

    Args:
        recipe: the variants.
        datasets, backbones, seeds: what the variants are crossed with, each once however often it is named.
        overrides: for every run; a variant's own keys win.
    """
    found = []
    for dataset, backbone, seed, (label, variant) in product(
        dict.fromkeys(datasets), dict.fromkeys(backbones), dict.fromkeys(seeds), recipe.variants.items()
    ):
        module_class = backbone.replace(":", "-")  # `RUN:MODEL` is how a run's model is named
        run = "-".join(["sweep", slug(recipe.name), dataset, module_class, f"s{seed}", slug(label)])
        # `distillation.rho` and `distillation: {rho: …}` are one key
        given = {**flatten(overrides), **flatten(variant), "dataset": dataset, "backbone": backbone, "seed": seed, "name": run}
        found.append(Job(run, dataset, backbone, seed, label, given))
    return found


def slug(label: str) -> str:
    """A label as part of a folder's name: ``rho 0.1`` -> ``rho-0.1``."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")
