"""``ckd-fed report``, ``runs`` and ``compare``: look at what runs came to."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from ckd_fed.commands.places import at_home, home_option, output_folder


def add_commands(commands: Any) -> None:
    """Add this family to the command's sub-parsers."""
    home = home_option("runs are in its runs/")
    report = commands.add_parser("report", parents=[home], help="write a run's report: one HTML file and a PNG of each figure")
    report.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    report.add_argument("--output", metavar="DIR", help="folder to write to; by default report/ in the run's folder")
    report.set_defaults(action=at_home(_report))
    runs = commands.add_parser("runs", parents=[home], help="list the runs of this machine, the latest last")
    runs.set_defaults(action=at_home(_runs))
    compare = commands.add_parser("compare", parents=[home], help="compare runs user by user, each with the first")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run, by name or folder; RUN:plain or RUN:teacher/text for another model of it")
    compare.add_argument("--metric", default="recall@20", help="for example recall@20, ndcg@10 (by default recall@20)")
    compare.add_argument("--plot", metavar="FILE.png", help="also write a PNG")
    compare.set_defaults(action=at_home(_compare))


def _report(arguments: argparse.Namespace) -> None:
    from ckd_fed.analysis.locate import find_run
    from ckd_fed.report.write import write_report

    directory = find_run(arguments.run)
    print(write_report(directory, output_folder(arguments.output, directory / "report")))


def _runs(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ckd_fed.analysis.history import read_history
    from ckd_fed.analysis.locate import RECORD, list_runs, runs_directory
    from ckd_fed.errors import DataError
    from ckd_fed.evaluation.metrics import METRIC

    root = runs_directory()
    table = Table(title=f"runs in {escape(str(root))}", title_justify="left")
    for column in ("name", "dataset", "backbone", "state", "best val R@20", "test R@20", "when"):
        table.add_column(column, justify="right" if "R@20" in column else "left", overflow="fold")
    for directory in list_runs(root):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime((directory / RECORD).stat().st_mtime))
        try:
            history = read_history(directory)
        except DataError:
            table.add_row(escape(directory.name), "", "", "damaged", "", "", when)
            continue
        tested = history.tested("student").get(METRIC)
        numbers = ["" if value is None else f"{value:.4f}" for value in (history.best, tested)]
        names = [escape(str(history.config.get(key, ""))) for key in ("dataset", "backbone")]
        table.add_row(escape(directory.name), *names, history.state, *numbers, when)
    _print(Console, table)


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ckd_fed.analysis.compare import compare, read_entry
    from ckd_fed.errors import ConfigError

    if len(arguments.runs) < 2:
        raise ConfigError("compare needs at least two runs, for example: ckd-fed compare mine:plain mine")
    plot = _png(arguments.plot) if arguments.plot else None
    entries = [read_entry(name) for name in arguments.runs]
    found = compare(entries, arguments.metric)
    table = Table(title=f"{arguments.metric} on test, {found[0].n:,} users; differences to the first run", title_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("mean", "difference", "95 % interval", "p", "p (Holm)"):
        table.add_column(column, justify="right")
    table.add_row(escape(found[0].label), f"{found[0].mean:.4f}", "", "", "", "")
    for one in found[1:]:
        relative = f" ({one.difference / found[0].mean:+.1%})" if found[0].mean else ""
        tested = ["", "", ""] if math.isnan(one.p) else [f"{one.low:+.4f} … {one.high:+.4f}", f"{one.p:.2g}", f"{one.p_holm:.2g}"]
        table.add_row(escape(one.label), f"{one.mean:.4f}", f"{one.difference:+.4f}{relative}", *tested)
    _print(Console, table)
    print("Paired over users: interval and p of Student's t-test. It says how sure the difference is for these users and these training runs;")
    print("another seed moves both runs as well, so train several seeds before calling one method better.")
    if plot:
        from ckd_fed.report.comparison import write_comparison

        write_comparison(entries, found, arguments.metric, plot)
        print(plot)


def _png(given: str) -> Path:
    """The file of ``--plot``.

    Raises:
        ConfigError: it is called otherwise than a PNG, or cannot be a file.
    """
    from ckd_fed.errors import ConfigError
    from ckd_fed.files import check_folder, expanded

    path = expanded(given, "--plot")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot is {given!r}; it is a PNG that is written, so give a name that ends in .png, for example comparison.png")
    if path.is_dir():
        raise ConfigError(f"--plot is {given!r}, which is a folder; give the name of a file in it, for example {path / 'comparison.png'}")
    check_folder(path.parent, "the folder of --plot")
    return path


def _print(console: Any, table: Any) -> None:
    """On a terminal as wide as it is, elsewhere wide enough that nothing folds early."""
    import sys

    console(width=None if sys.stdout.isatty() else 140).print(table)
