"""``ckd-fed sweep``: many runs by recipe."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any, override: argparse.ArgumentParser) -> None:
    """Add this family to the command's sub-parsers; ``override`` brings -c."""
    sweep = commands.add_parser("sweep", parents=[override], help="run a recipe over datasets, backbones and seeds; can be broken off and taken up")
    sweep.add_argument(
        "recipe", metavar="RECIPE", help="a file in configs/sweeps or configs/recipes, by name (ablations, sensitivity, …), or a YAML file"
    )
    sweep.add_argument("--dataset", action="append", metavar="NAME", help="may be repeated (by default baby)")
    sweep.add_argument("--backbone", action="append", metavar="NAME", help="may be repeated (by default vbpr)")
    sweep.add_argument("--seeds", default="123,2024,7", help="comma-separated (by default 123,2024,7)")
    sweep.add_argument("--output", metavar="DIR", help="folder of table and figure; by default sweeps/<recipe> beside the runs")
    sweep.add_argument("--dry-run", action="store_true", help="only list the runs")
    sweep.set_defaults(action=_sweep)


def _sweep(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ckd_fed.analysis.locate import runs_directory
    from ckd_fed.cli import parse_overrides
    from ckd_fed.commands.places import output_folder
    from ckd_fed.errors import CkdError, ConfigError
    from ckd_fed.experiments.recipe import Job, jobs, read_sweep, refuse_own_keys

    recipe = read_sweep(arguments.recipe)
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds is {arguments.seeds!r}; whole numbers separated by commas are needed, for example 123,2024,7") from None
    overrides = {"tracking.report": False, **parse_overrides(arguments.config)}
    refuse_own_keys("-c", overrides)
    planned = jobs(recipe, arguments.dataset or ["baby"], arguments.backbone or ["vbpr"], seeds, overrides)
    folder = output_folder(arguments.output, runs_directory().parent / "sweeps" / recipe.name)
    if arguments.dry_run:
        from ckd_fed.backbones.build import check_options
        from ckd_fed.config import resolve
        from ckd_fed.data.locate import STANDINS, locate

        for job in planned:
            config = resolve(job.overrides)
            check_options(job.backbone, config.model)
            if job.dataset not in STANDINS:  # a stand-in would be generated
                locate(config)
        for job in planned:
            print(job.run)
        return

    from ckd_fed.experiments.progress import SweepProgress
    from ckd_fed.experiments.summary import summarise, table_rows, write_summary
    from ckd_fed.experiments.sweep import run_jobs

    console = Console(width=None if Console().is_terminal else 220)
    failed: dict[Job, str] = {}

    def done(job: Job, how: str) -> None:
        if how.startswith("failed"):
            failed[job] = how
        progress.done(job, how)

    with SweepProgress(console, len(planned)) as progress:
        found = run_jobs(planned, done, progress.write, progress.at)
    if found:
        lines = summarise(recipe, found)
        header, rows = table_rows(lines)
        table = Table(title=escape(recipe.title), title_justify="left")
        for column in header:
            table.add_column(column, justify="left" if column in ("dataset", "backbone", "variant") else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for path in write_summary(recipe, lines, folder):
            print(path)
    if failed:
        by_reason: dict[str, list[str]] = {}
        for job, how in failed.items():
            by_reason.setdefault(how, []).append(job.run)
        reasons = "; ".join(f"{', '.join(names)} ({how})" for how, names in by_reason.items())
        raise CkdError(f"{len(failed)} of {len(planned)} runs failed: {reasons}")
