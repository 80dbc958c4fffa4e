"""``ckd-fed report``: look at what runs came to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add this family to the command's sub-parsers."""
    report = commands.add_parser("report", help="write a run's report: one HTML file and a PNG of each figure")
    report.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    report.add_argument("--output", metavar="DIR", help="folder to write to; by default report/ in the run's folder")
    report.set_defaults(action=_report)


def _report(arguments: argparse.Namespace) -> None:
    from ckd_fed.analysis.locate import find_run
    from ckd_fed.report.write import write_report

    print(write_report(find_run(arguments.run), Path(arguments.output).expanduser() if arguments.output else None))
