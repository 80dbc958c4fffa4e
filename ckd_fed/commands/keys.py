"""The reference of configuration keys: on a terminal, and as ``docs/configuration.md``."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from inspect import cleandoc
from typing import Any, get_type_hints

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.build import backbone_class, options_of
from ckd_fed.config import Config, Scalar, resolve

_LAYERS = """\
# Configuration

This page is written by `ckd-fed config --keys --markdown > docs/configuration.md`.

A value can come from several places. The last one in this list takes precedence:

1. the defaults below
2. `configs/datasets/<dataset>.yaml`
3. `configs/backbones/<backbone>.yaml`
4. on the stand-in: `configs/datasets/<dataset>-standin.yaml`
5. `configs/recipes/<recipe>.yaml`
6. in a federation: `[tool.flwr.app.config]` in the simulation's `pyproject.toml`
7. `-c` on the command line, for example `-c 'training.epochs=50 model.embedding-dim=32'`

Hyphens and underscores in keys are the same. An empty string means that the key is not set there. `ckd-fed config` prints the values that
a run would have; give it the same `-c`. The defaults of `model.*` below include `configs/backbones/<backbone>.yaml`, which also sets
`training.learning-rate`.
"""


def keys_text(width: int = 100) -> str:
    """Every configuration key with its default, meaning and allowed values, as lines of a terminal."""
    lines: list[str] = []
    for heading, keys in _described_keys().items():
        lines += ["", heading.replace("`", "")]
        names, defaults = max(len(key.name) for key in keys), max(len(_shown(key.default)) for key in keys)
        for key in keys:
            start = f"  {key.name:<{names}}  {_shown(key.default):<{defaults}}  "
            text = f"{key.help} ({key.allowed})".replace("`", "").strip()
            lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)
    return "\n".join([*lines[1:], ""])


def keys_markdown() -> str:
    """The same as ``docs/configuration.md``, after the layers that a value can come from."""
    lines = [_LAYERS]
    for heading, keys in _described_keys().items():
        rows = [f"| `{key.name}` | `{_shown(key.default)}` | {key.allowed} | {key.help} |" for key in keys]
        lines += [f"## {heading}", "", "| key | default | allowed | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _described_keys() -> dict[str, list[Key]]:
    return {**described_sections(), **{f"`model.*` with `backbone={name}`": described_options(name) for name in sorted(BACKBONES)}}


def _shown(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


@dataclass(frozen=True)
class Key:
    """What ``ckd-fed config --keys`` says of a key.

    Attributes:
        name: dotted and hyphenated.
        default: its value where nothing sets it.
        allowed: type, range or choices, in words.
        help: what it means.
    """

    name: str
    default: Scalar
    allowed: str
    help: str


def described_sections() -> dict[str, list[Key]]:
    """Heading of a section -> its keys, for all but ``model.*``; headings and meanings have names in backticks."""
    found = {"What is run": _described(Config, "")}
    for name, owner in get_type_hints(Config).items():
        if dataclasses.is_dataclass(owner) and isinstance(owner, type):
            found[(owner.__doc__ or name).replace("``", "`").rstrip(".")] = _described(owner, f"{name}.")
    return found


def _described(owner: type, prefix: str) -> list[Key]:
    hints = get_type_hints(owner)
    return [
        Key((prefix + item.name).replace("_", "-"), getattr(owner, item.name), in_words(hints[item.name], item.metadata), item.metadata["help"])
        for item in fields(owner)
        if "help" in item.metadata
    ]


def in_words(kind: type, rules: Mapping[str, Any]) -> str:
    """The values that a key of some type may have, for example ``whole number, at least 1``."""
    if "allowed" in rules:
        return str(rules["allowed"])
    if "choices" in rules:
        *first, last = rules["choices"]
        return f"{', '.join(first)} or {last}"
    noun = {bool: "true or false", int: "whole number", float: "number"}.get(kind, "text")
    limits = {"low": "at least", "above": "above", "below": "below", "high": "at most"}
    return ", ".join([noun, *(f"{word} {rules[rule]}" for rule, word in limits.items() if rule in rules)])


def described_options(name: str) -> list[Key]:
    """The options of a backbone that comes with this package; defaults are those of a run, with ``configs/backbones/<name>.yaml``."""
    configured, lows = resolve({"backbone": name}).model, {int: 1, float: 0}
    found = []
    for option, parameter in options_of(name).items():
        kind = type(parameter.default)
        allowed = in_words(kind, {"low": lows[kind]} if kind in lows else {})
        found.append(Key(f"model.{option.replace('_', '-')}", configured.get(option, parameter.default), allowed, _meaning(name, option)))
    return found


def _meaning(name: str, option: str) -> str:
    """What the docstring of a backbone's class says of an option, or that of a base class where it refers to one."""
    for owner in backbone_class(name).__mro__:
        text = _arguments(owner).get(option, "see ")
        if not text.startswith("see "):
            return text
    return ""


def _arguments(owner: type) -> dict[str, str]:
    """Parameter -> its text in the ``Args`` of a class's docstring, on one line and with names in backticks."""
    _, _, section = cleandoc(owner.__doc__ or "").partition("\nArgs:\n")
    found = {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {5,}.+)*)", section.split("\n\n")[0], flags=re.MULTILINE):
        plain = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
        found.update(dict.fromkeys(names.split(", "), plain))
    return found
