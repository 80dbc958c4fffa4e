"""Options of commands that name places: ``--home`` and ``--output``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Action = Callable[[argparse.Namespace], None]


def home_option(contents: str) -> argparse.ArgumentParser:
    """A parent for the parsers of commands that look into the home; what is where in it, in words."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--home", default="", metavar="DIR", help=f"instead of $CKD_FED_HOME or ~/.ckd_fed; {contents}")
    return parser


def at_home(action: Action) -> Action:
    """The action of a command with :func:`home_option`, done where that says."""

    def act(arguments: argparse.Namespace) -> None:
        with home_given(arguments.home):
            action(arguments)

    return act


def output_folder(given: str | None, otherwise: Path) -> Path:
    """The folder of ``--output``, or the one that is meant without it.

    Raises:
        ConfigError: it can be no folder.
    """
    from ckd_fed.files import check_folder, expanded

    if not given:
        return otherwise
    path = expanded(given, "--output")
    check_folder(path, "--output")
    return path


@contextmanager
def home_given(text: str) -> Iterator[None]:
    """Within it, the value of ``--home`` counts for $CKD_FED_HOME: for runs by name, and for the data of a run that names no home.

    Args:
        text: a folder, also a relative one; empty leaves all as it is.

    Raises:
        ConfigError: it can be no folder.
    """
    from ckd_fed.files import check_folder, expanded

    if not text:
        yield
        return
    path = expanded(text, "--home").absolute()
    check_folder(path, "--home")
    before = os.environ.get("CKD_FED_HOME")
    os.environ["CKD_FED_HOME"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CKD_FED_HOME"]
        else:
            os.environ["CKD_FED_HOME"] = before
