"""Multimodal backbones by name; importing this package imports none of them (nor torch)."""

from __future__ import annotations

BACKBONES = {
    "bm3": "ckd_fed.backbones.bm3:BM3",
    "egogcn": "ckd_fed.backbones.egogcn:EgoGCN",
    "grcn": "ckd_fed.backbones.grcn:GRCN",
    "mmgcn": "ckd_fed.backbones.mmgcn:MMGCN",
    "vbpr": "ckd_fed.backbones.vbpr:VBPR",
}
