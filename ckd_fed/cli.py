"""The ``ckd-fed`` command."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckd_fed import __version__
from ckd_fed.commands import data, delivery, experiments, results, wandb
from ckd_fed.deploy import commands as deploy
from ckd_fed.errors import CkdError, ConfigError, DataError

if TYPE_CHECKING:
    from ckd_fed.config import Config

# Heavy imports (torch, wandb) happen in the commands that need them, so that --help stays quick.

_OVERRIDE = re.compile(r"""\s*([\w.\-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"']+)""")


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Configuration overrides as ``flwr run -c`` takes them: ``'a.b=1 c="x"'``, or the name of a TOML file.

    A bare word counts as a string, so that ``backbone=mmgcn`` needs no quotes within quotes.

    Returns:
        Dotted keys with underscores, each with the last value given.
    """
    from ckd_fed.config import flatten

    values: dict[str, Any] = {}
    for text in texts:
        if text.endswith(".toml"):
            try:
                values.update(flatten(tomllib.loads(Path(text).read_text())))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise ConfigError(f"-c {text}: {error}") from None
            continue
        position = 0
        while position < len(text.rstrip()):
            match = _OVERRIDE.match(text, position)
            if not match:
                raise ConfigError(
                    f"-c {text!r} cannot be read from {text[position:].strip()!r} on; write key=value pairs such as 'training.epochs=50'"
                )
            key, value = match.groups()
            try:
                read = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                read = value
            if isinstance(read, (datetime.date, datetime.time)):  # no key has one: a name such as 2026-01-15
                read = value
            values.update(flatten({key: read}))
            position = match.end()
    return values


def _train(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from ckd_fed.tracking.live import LiveProgress
    from ckd_fed.training.central import configure, train

    config, console = configure(parse_overrides(arguments.config)), Console()
    if not console.is_terminal:
        train(config)
        return
    with LiveProgress(console, config.training.epochs) as live:
        train(config, live.write, [lambda directory: live])


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from ckd_fed.config import flatten, resolve
    from ckd_fed.launch import app_config, flower_run
    from ckd_fed.tracking.live import FollowedLog, LiveProgress

    app, overrides = Path(arguments.app), parse_overrides(arguments.config)
    declared = flatten(app_config(app))
    _check_options(resolve(declared, overrides))  # a wrong key or value is told here and now, not by a ServerApp half a minute later
    for key in overrides:
        if key not in declared:  # an option of a backbone of one's own
            shown = key.replace("_", "-")
            raise ConfigError(f"-c sets {shown}, and Flower takes no key that the app does not name: write it into {app}/pyproject.toml first")
    words, console = [toml_overrides(overrides)] if overrides else [], Console()
    if not console.is_terminal:
        flower_run(app, arguments.connection, words, print)
        return
    with LiveProgress(console) as live:
        flower_run(app, arguments.connection, words, live.write, FollowedLog(live).line)


def toml_overrides(values: dict[str, Any]) -> str:
    """Overrides as the TOML that ``flwr run -c`` insists on: strings quoted.

    Raises:
        ConfigError: a string with both kinds of quotes, which Flower's command cannot take.
    """
    hyphenated = {key.replace("_", "-"): value for key, value in values.items()}
    return " ".join(f"{key}={_toml(key, value)}" for key, value in hyphenated.items())


def _toml(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value)
    if '"' not in text:  # Flower takes the next one for the end, escaped or not
        return json.dumps(text, ensure_ascii=False)
    if "'" in text:
        raise ConfigError(f"{key} is {text!r}; `flwr run -c` takes no value with both kinds of quotes, leave one of them out")
    return f"'{text}'"


def _verify(arguments: argparse.Namespace) -> None:
    from ckd_fed.verify import report

    failed = [name for name in arguments.files if not report(Path(name), print)]
    if failed:
        raise CkdError(f"not reproduced: {', '.join(failed)}")


def _config(arguments: argparse.Namespace) -> None:
    from ckd_fed.config import resolve
    from ckd_fed.data.locate import resolve_for_data

    if arguments.markdown and not arguments.keys:
        raise ConfigError("--markdown is for the reference of keys: ckd-fed config --keys --markdown")
    if arguments.keys:
        from ckd_fed.commands.keys import keys_markdown, keys_text

        print(keys_markdown() if arguments.markdown else keys_text(), end="")
        return
    overrides = parse_overrides(arguments.config)
    try:
        config = resolve_for_data(overrides)
    except DataError:  # the data may be on other machines
        config = resolve(overrides)
    _check_options(config)
    print(config.to_yaml(), end="")


def _check_options(config: Config) -> None:
    """Check the options of the backbone, except where it is on the nodes only, or for a run to go on with, whose own options count.

    Raises:
        ConfigError: an unknown or impossible option.
    """
    from ckd_fed.backbones.build import check_options, importable

    if not config.resume and importable(config.backbone):
        check_options(config.backbone, config.model)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="ckd-fed", description="Federated counterfactual knowledge distillation for multimodal recommenders.")
    parser.add_argument("--version", action="version", version=f"ckd-fed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    override = argparse.ArgumentParser(add_help=False)
    override.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="override configuration keys, or name a TOML file; may be repeated",
    )
    train = commands.add_parser("train", parents=[override], help="train teachers and student in this process, without Flower")
    train.set_defaults(action=_train)
    run = commands.add_parser("run", parents=[override], help="flwr run, then wait; exits non-zero if the run failed")
    run.add_argument("app", help="directory of the Flower app, for example simulations/baby")
    run.add_argument("connection", nargs="?", help="name of a SuperLink connection; by default Flower's default connection")
    run.set_defaults(action=_run)
    verify = commands.add_parser("verify", help="recompute published reference files; exits 0 only if all errors are under 1e-9")
    verify.add_argument("files", nargs="+", metavar="FILE")
    verify.set_defaults(action=_verify)
    config = commands.add_parser("config", parents=[override], help="print the resolved configuration")
    config.add_argument("--keys", action="store_true", help="explain every key instead, with its default and its allowed values")
    config.add_argument("--markdown", action="store_true", help="with --keys: print docs/configuration.md")
    config.set_defaults(action=_config)
    for family in (data, results, delivery, wandb, deploy):
        family.add_commands(commands)
    experiments.add_commands(commands, override)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors that a user can mend are one line on stderr and exit code 1."""
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.action(parsed)
    except CkdError as error:
        sys.stdout.flush()
        print(f"ckd-fed: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a full or unwritable disk, above all
        print(f"ckd-fed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("ckd-fed: interrupted", file=sys.stderr)
        sys.exit(130)
