"""The reference of configuration keys: on a terminal, and as ``docs/configuration.md``."""

from __future__ import annotations

import textwrap

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.build import described_options
from ckd_fed.config import Key, Scalar, described_sections

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
