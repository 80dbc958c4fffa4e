"""``ckd-fed data …``: from published or own files to a checked dataset."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckd_fed.commands.places import at_home, home_option
from ckd_fed.errors import ConfigError, DataError

# Heavy imports happen in the commands that need them, so that --help stays quick.

Subparsers = Any  # argparse's own class for it is private


def add_commands(commands: Subparsers) -> None:
    """Add ``data`` and its subcommands to the command's parser."""
    group = commands.add_parser("data", help="import, inspect and lay out datasets")
    data = group.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    home = home_option("datasets are in its data/")
    _add_import(data, home)
    _add_fetch(data, home)
    _add_prepare(data, home)
    _add_inspect(data, home)
    _add_transform(data, home)
    _add_silos(data, home)


def data_directory() -> Path:
    """``<home>/data``."""
    from ckd_fed.config import Config
    from ckd_fed.home import home

    return home(Config()) / "data"


def dataset_directory(name: str) -> Path:
    """The folder of a dataset that the user names: an existing folder, or a name under ``<home>/data``.

    Raises:
        DataError: there is none.
    """
    from ckd_fed.errors import unknown
    from ckd_fed.files import expanded

    root = data_directory()
    if "/" in name or name in (".", ".."):
        path = expanded(name, "the dataset")
        if not path.is_dir():
            raise DataError(f"{path} is no folder")
        return path
    if not name or not (root / name).is_dir():
        present = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")) if root.is_dir() else []
        raise DataError(f"{root}: {unknown('dataset', name, present or ['none yet'])}; for a folder elsewhere give its path with a slash")
    return root / name


def sources_directory(arguments: argparse.Namespace, option: str) -> Path:
    """Where a publisher's files are: the folder given with an option, else ``<home>/sources/<dataset>``."""
    from ckd_fed.files import check_folder, expanded

    if arguments.directory:
        path = expanded(arguments.directory, option)
        check_folder(path, option)
        return path
    return data_directory().parent / "sources" / str(arguments.dataset)


def _add_import(data: Subparsers, home: argparse.ArgumentParser) -> None:
    command = data.add_parser(
        "import",
        parents=[home],
        help="import files in a published layout (LATTICE, MMRec, HKUDS), or tables of one's own",
        description="Import a folder in LATTICE's, MMRec's or HKUDS's layout, or files: one table of interactions (CSV, TSV or parquet with a user "
        "and an item column) and feature tables (.npy, .npz, .safetensors, parquet or CSV, named after their modality) that are aligned by id.",
    )
    command.add_argument("paths", nargs="+", metavar="PATH", help="a folder, or files")
    command.add_argument("--as", required=True, dest="name", metavar="NAME", help="name of the dataset to make")
    command.add_argument("--layout", choices=["lattice", "mmrec", "hkuds", "own"], default="", help="by default told from the files")
    command.add_argument("--replace", action="store_true", help="put it in the place of a dataset of that name")
    command.add_argument("--dtype", choices=["float16", "float32"], default="", help="of the features on disk; by default as they come")
    own = command.add_argument_group("own tables")
    own.add_argument("--features", action="append", default=[], metavar="MODALITY=FILE", help="where the file name does not say the modality")
    own.add_argument(
        "--split", default="", metavar="RULE", help="random (per user 80/10/10; the default), leave-one-out, temporal, cold-items or warm-and-cold"
    )
    own.add_argument("--seed", type=int, default=123, help="of the split rule (123)")
    for column in ("user", "item", "time", "split", "id"):
        table = "the feature tables" if column == "id" else "the interactions"
        own.add_argument(f"--{column}-column", default="", metavar="NAME", help=f"of {table}, where its name is none of the usual")
    own.add_argument(
        "--rows-are-ids", action="store_true", help="row k of a .npy, .npz or .safetensors without ids belongs to the item with the id k"
    )
    command.set_defaults(action=at_home(_import))


def _import(arguments: argparse.Namespace) -> None:
    from ckd_fed.data.draft import check_name, write_draft
    from ckd_fed.data.importers.detect import read_draft
    from ckd_fed.data.importers.own import Options
    from ckd_fed.files import expanded

    check_name(arguments.name)
    destination = data_directory() / arguments.name
    if destination.exists() and not arguments.replace:  # before minutes of reading
        raise DataError(f"{destination} exists; choose another name, or say --replace to put this dataset in its place")
    if arguments.seed < 0:
        raise ConfigError(f"--seed is {arguments.seed}; a whole number from 0 is needed")
    options = Options(
        arguments.user_column,
        arguments.item_column,
        arguments.time_column,
        arguments.split_column,
        arguments.id_column,
        arguments.split,
        arguments.seed,
        arguments.rows_are_ids,
    )
    paths = [expanded(path, "PATH") for path in arguments.paths]
    given = _assignments("--features", arguments.features, "text=vectors.parquet")
    features = {modality: expanded(path, f"--features {modality}") for modality, path in given.items()}
    draft = read_draft(paths, layout=arguments.layout, features=features, options=options)
    about = write_draft(draft, destination, dtype=arguments.dtype, replace=arguments.replace)
    print_summary(destination, about)


def _assignments(what: str, texts: list[str], example: str) -> dict[str, str]:
    """``MODALITY=VALUE`` arguments."""
    table: dict[str, str] = {}
    for text in texts:
        modality, equals, value = text.partition("=")
        if not (equals and modality and value):
            raise ConfigError(f"{what} {text!r}: MODALITY=… is needed, for example {example}")
        if modality in table:
            raise ConfigError(f"{what} names the modality {modality!r} twice")
        table[modality] = value
    return table


def print_summary(destination: Path, about: dict[str, Any]) -> None:
    """What was written, and what was left out on the way."""
    from ckd_fed.data.splits import RULE_WORDS

    rule = about["split"]
    print(f"{destination}: {about['users']:,} users, {about['items']:,} items")
    drawn = f", seed {rule['seed']}" if "seed" in rule else ""
    words = f": {RULE_WORDS[rule['rule']]}" if rule["rule"] in RULE_WORDS else ""
    print(f"  train {rule['train']:,}, val {rule['val']:,}, test {rule['test']:,} interactions (split: {rule['rule']}{drawn}{words})")
    for modality, one in about["modalities"].items():
        changed = f", {one['transform']}" if "transform" in one else ""
        lacking = f", {one['missing']:,} items lack it" if one["missing"] else ", no item lacks it"
        print(f"  {modality}: {one['dimension']}-d {one['dtype']} from {one['source']}{changed}{lacking}")
    for note in about["notes"]:
        print(f"  note: {note}")
    if len(about["modalities"]) < 2:
        print("  note: a student needs two modalities or more; this dataset serves a teacher")


def _add_inspect(data: Subparsers, home: argparse.ArgumentParser) -> None:
    command = data.add_parser("inspect", parents=[home], help="measure a dataset and say what is wrong with it")
    command.add_argument("dataset", metavar="NAME|DIR", help="a name under the home's data/, or a folder's path with a slash in it")
    command.add_argument("--plot", default="", metavar="FILE.png", help="also draw it")
    command.set_defaults(action=at_home(_inspect))


def _inspect(arguments: argparse.Namespace) -> None:
    from ckd_fed.data.dataset import load_dataset
    from ckd_fed.data.inspect import describe, inspect
    from ckd_fed.files import expanded

    plot = expanded(arguments.plot, "--plot") if arguments.plot else None
    if plot:
        from ckd_fed.data.plot import check_format

        check_format(plot)
    report = inspect(load_dataset(dataset_directory(arguments.dataset), at_least=0))
    print("\n".join(describe(report)))
    if plot:
        from ckd_fed.data.plot import plot_report

        plot_report(report, plot)
        print(f"drawn into {arguments.plot}")


def _add_silos(data: Subparsers, home: argparse.ArgumentParser) -> None:
    command = data.add_parser(
        "split-by-modality",
        parents=[home],
        help="write what each node may have, one folder a node",
        description="Write one folder a node: teacher-<modality> with the interactions and that modality, student with everything.",
    )
    command.add_argument("dataset", metavar="NAME|DIR", help="a name under the home's data/, or a folder's path with a slash in it")
    command.add_argument("directory", metavar="DIR", help="folder to make")
    command.set_defaults(action=at_home(_silos))


def _silos(arguments: argparse.Namespace) -> None:
    from ckd_fed.data.silos import STUDENT, split_by_modality
    from ckd_fed.files import check_folder, expanded

    destination = expanded(arguments.directory, "DIR").absolute()
    check_folder(destination.parent, "the folder above DIR")
    for folder, files in split_by_modality(dataset_directory(arguments.dataset), destination).items():
        role = 'role="student"' if folder == STUDENT else f'role="teacher" modality="{folder.partition("-")[2]}"'
        print(f"{destination / folder}: {', '.join(files)}")
        print(f"  flower-supernode … --node-config '{role} data-dir=\"<where this folder goes>\"'")


def _add_prepare(data: Subparsers, home: argparse.ArgumentParser) -> None:
    command = data.add_parser(
        "prepare",
        parents=[home],
        help="make Amazon baby, sports, clothing or beauty from the publisher's files",
        description="From reviews_*_5.json.gz, meta_*.json.gz and image_features_*.b: ids, the 5-core check, the published split rule, image "
        "features by ASIN, and text features of title, brand, categories and description.",
    )
    command.add_argument("dataset", metavar="baby|sports|clothing|beauty")
    command.add_argument("--from", default="", dest="directory", metavar="DIR", help="where the publisher's files are; by default fetch's")
    command.add_argument("--as", default="", dest="name", metavar="NAME", help="name of the dataset to make; by default its own")
    command.add_argument(
        "--encoder",
        default="",
        metavar="NAME",
        help="of the texts: a model of sentence-transformers, by default the literature's (sentence-transformers/all-MiniLM-L6-v2), or "
        "module:function",
    )
    command.add_argument(
        "--text-vectors", default="", metavar="FILE", help="text features computed elsewhere, with ASINs for ids (column item_id or asin)"
    )
    command.add_argument(
        "--split", default="random", metavar="RULE", help="random (the published rule), leave-one-out, temporal, cold-items or warm-and-cold"
    )
    command.add_argument("--seed", type=int, default=123, help="of the split rule (123)")
    command.add_argument("--dtype", choices=["float16", "float32"], default="", help="of the features on disk")
    command.add_argument("--replace", action="store_true", help="put it in the place of a dataset of that name")
    command.set_defaults(action=at_home(_prepare))


def _prepare(arguments: argparse.Namespace) -> None:
    from ckd_fed.data.draft import check_name, write_draft
    from ckd_fed.data.prepare import prepare
    from ckd_fed.files import expanded

    name = arguments.name or arguments.dataset
    check_name(name)
    destination = data_directory() / name
    if destination.exists() and not arguments.replace:
        raise DataError(f"{destination} exists; choose another name, or say --replace to put this dataset in its place")
    if arguments.seed < 0:
        raise ConfigError(f"--seed is {arguments.seed}; a whole number from 0 is needed")
    draft = prepare(
        arguments.dataset,
        sources_directory(arguments, "--from"),
        show_progress,
        rule=arguments.split,
        seed=arguments.seed,
        encoder=arguments.encoder,
        text_vectors=expanded(arguments.text_vectors, "--text-vectors") if arguments.text_vectors else None,
    )
    print_summary(destination, write_draft(draft, destination, dtype=arguments.dtype, replace=arguments.replace))


@contextmanager
def show_progress(path: Path) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for reading a file; the function it gives is told the bytes read so far."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name, total=path.stat().st_size)
        yield lambda done: progress.update(task, completed=done)


def _add_fetch(data: Subparsers, home: argparse.ArgumentParser) -> None:
    command = data.add_parser(
        "fetch",
        parents=[home],
        help="download a dataset's files from their publisher",
        description="Download the files named in configs/sources/NAME.yaml from their publisher; a download that was cut goes on where it ended.",
    )
    command.add_argument("dataset", metavar="NAME", help="baby, sports, clothing or beauty")
    command.add_argument("--to", default="", dest="directory", metavar="DIR", help="by default the home's sources/NAME")
    command.set_defaults(action=at_home(_fetch))


def _fetch(arguments: argparse.Namespace) -> None:
    from ckd_fed.data.fetch import fetch, read_sources

    sources = read_sources(arguments.dataset)
    directory = sources_directory(arguments, "--to")
    for source in sources:
        with show_download(source.name) as progress:
            digest = fetch(source, directory, progress)
        known = "as published" if source.sha256 else "the publisher states none to hold it against"
        print(f"{directory / source.name}: sha256 {digest} ({known})")


@contextmanager
def show_download(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr for a download."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _add_transform(data: Subparsers, home: argparse.ArgumentParser) -> None:
    command = data.add_parser(
        "transform",
        parents=[home],
        help="make a dataset with transformed features",
        description="Make a dataset of another with features transformed: center, z-score, row-norm, pca:N, or several joined by +. They are fitted "
        "on the items that have the modality, and recorded in the manifest.",
    )
    command.add_argument("dataset", metavar="NAME|DIR", help="a name under the home's data/, or a folder's path with a slash in it")
    command.add_argument("transforms", nargs="+", metavar="MODALITY=TRANSFORM", help="for example image=center+row-norm text=pca:64")
    command.add_argument("--as", required=True, dest="name", metavar="NAME", help="name of the dataset to make")
    command.add_argument("--dtype", choices=["float16", "float32"], default="", help="of the features on disk; by default as they come")
    command.add_argument("--replace", action="store_true", help="put it in the place of a dataset of that name")
    command.set_defaults(action=at_home(_transform))


def _transform(arguments: argparse.Namespace) -> None:
    from ckd_fed.data.draft import check_name, write_draft
    from ckd_fed.data.transforms import transformed_draft

    check_name(arguments.name)
    transforms = _assignments("transform", arguments.transforms, "image=center")
    destination = data_directory() / arguments.name
    draft = transformed_draft(dataset_directory(arguments.dataset), transforms)
    print_summary(destination, write_draft(draft, destination, dtype=arguments.dtype, replace=arguments.replace))
