"""Find a run's dataset on this machine, or generate the stand-in for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset, load_dataset
from ckd_fed.data.standin import generate_standin, is_standin
from ckd_fed.errors import ConfigError, DataError, unknown
from ckd_fed.files import expanded
from ckd_fed.home import home

STANDINS = ("baby",)


def locate(config: Config, node_config: Mapping[str, object] | None = None) -> tuple[Path, bool]:
    """The folder of the configured dataset and whether it is a stand-in.

    A node's own ``data-dir`` wins over ``data.dir``, which wins over ``<home>/data/<dataset>``. Where nothing is given, the real set
    is not there and a stand-in exists for it, the stand-in is generated (once) and used.

    Raises:
        DataError: the folder does not exist, or is a stand-in where none is wanted.
        ConfigError: the dataset is unknown, or has no stand-in where one is demanded.
    """
    standin, root = config.data.standin, home(config, node_config) / "data"
    given = str((node_config or {}).get("data-dir", "")) or config.data.dir
    if standin != "always" and given:
        path = expanded(given, "the dataset folder")
        if not path.is_absolute():
            raise ConfigError(f"the dataset folder is {given!r}; an absolute path is needed, because Flower starts the apps in folders of its own")
        if not path.is_dir():
            raise DataError(f"the dataset folder {path} does not exist on this machine")
        return _labelled(path, standin)
    real = root / config.dataset
    if standin != "always" and real.is_dir():
        return _labelled(real, standin)
    if config.dataset in STANDINS and standin != "never":
        return generate_standin(root / f"{config.dataset}-standin"), True
    if standin == "always":
        raise ConfigError(unknown("dataset with a built-in stand-in", config.dataset, STANDINS))
    present = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")) if root.is_dir() else []
    raise DataError(
        f"{unknown('dataset', config.dataset, [*present, *STANDINS])}; put its files into {real}, or name their folder with data.dir "
        "(on a node: data-dir in its node-config)"
    )


def _labelled(path: Path, standin: str) -> tuple[Path, bool]:
    found = is_standin(path)
    if found and standin == "never":
        raise DataError(f"the dataset folder {path} holds the generated stand-in, and data.standin is 'never'; name the real set's folder")
    return path, found


def resolve_for_data(*layers: Mapping[str, object]) -> Config:
    """Resolve a configuration knowing whether this machine's dataset is the stand-in; see :func:`~ckd_fed.config.resolve`."""
    config = resolve(*layers)
    _, standin = locate(config)
    return resolve(*layers, standin=True) if standin else config


def open_dataset(
    config: Config, node_config: Mapping[str, object] | None = None, *, modalities: Iterable[str] | None = None, at_least: int = 2
) -> Dataset:
    """Locate, load and check the dataset of a run; see :func:`locate` and :func:`~ckd_fed.data.dataset.load_dataset`.

    Args:
        config: the run's configuration.
        node_config: of the node, where there is one.
        modalities: which to open; by default ``data.modalities``, or all that are there.
        at_least: modalities needed.
    """
    path, standin = locate(config, node_config)
    wanted = modalities if modalities is not None else (config.modalities or None)
    return load_dataset(path, name=shown_name(config, standin), modalities=wanted, at_least=at_least, standin=standin)


def shown_name(config: Config, standin: bool) -> str:
    """What outputs call the dataset."""
    return f"{config.dataset} (generated stand-in)" if standin else config.dataset


def standin_notice(config: Config) -> str:
    """What whoever runs on a stand-in is told."""
    return (
        f"NOTE: this is a generated STAND-IN for {config.dataset}, not the real data; its numbers mean nothing outside this program. "
        f"For the real set put train.json, val.json, test.json and <modality>_feat.npy into {home(config) / 'data' / config.dataset}, "
        "or name their folder with data.dir."
    )
