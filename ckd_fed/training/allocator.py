"""How freed memory is kept, and given back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
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
    mallopt = _of_glibc("mallopt")
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give back to the system what was freed and kept, where the C library is glibc.

    For a change of work: the small pieces that training steps leave free are of no use to a validation's large tables, which would
    add to them (13 of 524 MB while distilling VBPR on Baby's published sizes). The next step then pays for clearing its pages once.
    """
    trim = _of_glibc("malloc_trim")
    if trim:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None
    return function
