"""``ckd-fed wandb replay``: what has to do with Weights & Biases."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add this family to the command's sub-parsers."""
    wandb = commands.add_parser("wandb", help="Weights & Biases: replay a run")
    actions = wandb.add_subparsers(dest="wandb_action", required=True, metavar="ACTION")
    replay = actions.add_parser("replay", help="rebuild a W&B run from a run's metrics.jsonl")
    replay.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    replay.add_argument("--mode", choices=("auto", "online", "offline"), default="auto", help="auto: online with a key, else offline")
    replay.add_argument("--project", help="W&B project; by default the run's")
    replay.set_defaults(action=_replay)


def _replay(arguments: argparse.Namespace) -> None:
    from ckd_fed.analysis.locate import find_run
    from ckd_fed.tracking.replay import replay

    overrides: dict[str, object] = {"tracking.wandb": arguments.mode}
    if arguments.project:
        overrides["tracking.project"] = arguments.project
    replay(find_run(arguments.run), overrides, print)
