"""Freed memory that is kept for the next step, and given back for other work."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from ckd_fed.training.allocator import keep_freed_memory
keep_freed_memory()
size = 1 << 21  # 8 MB of float32
for _ in range(20):
    torch.ones(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GIVE_BACK = """
import torch
from ckd_fed.training.allocator import give_back_freed_memory, keep_freed_memory
def resident():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))
keep_freed_memory()
blocks = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each
del blocks[::2]  # holes of 1 MB
before = resident()
give_back_freed_memory()
assert all(bool((block == 1).all()) for block in blocks)
print(before - resident())
"""


def printed(script, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", script], env={**clean, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def has_glibc():
    try:
        return "glibc" in os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):
        return False


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
def test_freed_blocks_are_not_asked_for_anew_unless_the_user_tuned_the_allocator():
    assert 10 * printed(SCRIPT) < printed(SCRIPT, MALLOC_MMAP_THRESHOLD_="65536")


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
def test_holes_between_blocks_are_given_back():
    assert printed(GIVE_BACK) > 80  # of 100 MB
