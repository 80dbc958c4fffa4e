"""Freed memory that is kept for the next step."""

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


def page_faults(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**clean, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def has_glibc():
    try:
        return "glibc" in os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):
        return False


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
def test_freed_blocks_are_not_asked_for_anew_unless_the_user_tuned_the_allocator():
    assert 10 * page_faults() < page_faults(MALLOC_MMAP_THRESHOLD_="65536")
