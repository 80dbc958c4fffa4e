"""How freed memory is kept."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next step, where it is glibc and nobody has tuned it.

    By default glibc gives large blocks back to the system and asks for them anew, a few times a step; every page of them is then
    cleared on first touch. That was 28 % of a VBPR distillation step on TikTok's sizes and 19 % of MMGCN's (CPU, two threads). Blocks
    over 32 MB, the most that glibc allows here, are still given back. The process' resident memory stays near its peak instead.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
