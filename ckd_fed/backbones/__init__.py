"""Multimodal backbones by name; importing this package imports none of them (nor torch)."""

from __future__ import annotations

BACKBONES = {
    "freedom": "ckd_fed.backbones.freedom:FREEDOM",
    "lattice": "ckd_fed.backbones.lattice:LATTICE",
    "mgcn": "ckd_fed.backbones.mgcn:MGCN",
    "micro": "ckd_fed.backbones.micro:MICRO",
    "mmgcn": "ckd_fed.backbones.mmgcn:MMGCN",
    "vbpr": "ckd_fed.backbones.vbpr:VBPR",
}
