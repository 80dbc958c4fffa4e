"""Multimodal backbones by name; importing this package imports none of them (nor torch).

A backbone of one's own is named ``module:Class`` in the configuration, or registered by its package as an entry point of the group
``ckd_fed.backbones`` and then has a name like the others (docs/backbones.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points

from ckd_fed.errors import ConfigError, unknown

BACKBONES = {
    "bm3": "ckd_fed.backbones.bm3:BM3",
    "egogcn": "ckd_fed.backbones.egogcn:EgoGCN",
    "freedom": "ckd_fed.backbones.freedom:FREEDOM",
    "grcn": "ckd_fed.backbones.grcn:GRCN",
    "lattice": "ckd_fed.backbones.lattice:LATTICE",
    "mgcn": "ckd_fed.backbones.mgcn:MGCN",
    "micro": "ckd_fed.backbones.micro:MICRO",
    "mmgcn": "ckd_fed.backbones.mmgcn:MMGCN",
    "vbpr": "ckd_fed.backbones.vbpr:VBPR",
}
ENTRY_POINTS = "ckd_fed.backbones"
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def backbone_target(name: str) -> str:
    """``module:Class`` behind a backbone's name; nothing is imported.

    Raises:
        ConfigError: unknown name; the message lists the choices.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if _TARGET.fullmatch(name):
        return name
    installed = _installed()
    if name not in installed:
        raise ConfigError(unknown("backbone", name, [*BACKBONES, *installed, "module:Class"]))
    return installed[name]


@cache
def _installed() -> Mapping[str, str]:
    """Backbones that other installed packages register."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
