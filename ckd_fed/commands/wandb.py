"""``ckd-fed wandb replay`` and ``dashboard``: what has to do with Weights & Biases."""

from __future__ import annotations

import argparse
from typing import Any

from ckd_fed.commands.places import at_home, home_option


def add_commands(commands: Any) -> None:
    """Add this family to the command's sub-parsers."""
    wandb = commands.add_parser("wandb", help="Weights & Biases: replay a run")
    actions = wandb.add_subparsers(dest="wandb_action", required=True, metavar="ACTION")
    replay = actions.add_parser("replay", parents=[home_option("runs are in its runs/")], help="rebuild a W&B run from a run's metrics.jsonl")
    replay.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    replay.add_argument("--mode", choices=("auto", "online", "offline"), default="auto", help="auto: online with a key, else offline")
    replay.add_argument("--project", help="W&B project; by default the run's")
    replay.set_defaults(action=at_home(_replay))
    dashboard = commands.add_parser("dashboard", help="create the W&B workspace of modality balance in your project")
    dashboard.add_argument("--project", default="ckd_fed", help="W&B project (by default ckd_fed)")
    dashboard.add_argument("--entity", default="", help="W&B user or team (by default yours)")
    dashboard.add_argument("--modalities", default="image,text", help="comma-separated (by default image,text)")
    dashboard.add_argument("--dry-run", action="store_true", help="print it and create nothing")
    dashboard.set_defaults(action=_dashboard)


def _replay(arguments: argparse.Namespace) -> None:
    from ckd_fed.analysis.locate import find_run
    from ckd_fed.tracking.replay import replay

    overrides: dict[str, object] = {"tracking.wandb": arguments.mode}
    if arguments.project:
        overrides["tracking.project"] = arguments.project
    replay(find_run(arguments.run), overrides, print)


def _dashboard(arguments: argparse.Namespace) -> None:
    from ckd_fed.errors import ConfigError
    from ckd_fed.tracking.dashboard import create, outline, sections

    modalities = list(dict.fromkeys(name.strip() for name in arguments.modalities.split(",") if name.strip()))
    if not modalities:
        raise ConfigError(f"--modalities is {arguments.modalities!r}; name at least one, for example image,text")
    wanted = sections(modalities)
    print(outline(wanted) if arguments.dry_run else create(wanted, arguments.entity, arguments.project))
