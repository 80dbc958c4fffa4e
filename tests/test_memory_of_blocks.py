"""Work in blocks stays as small as a block: nothing of users x items or items x items is ever in memory."""

import subprocess
import sys

import pytest

N = 12_000  # squared 549 MB of float32

SETUP = """
import sys, numpy as np, torch
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
from ckd_fed.backbones.base import Embeddings
from ckd_fed.backbones.item_graph import nearest
from ckd_fed.data.interactions import Interactions
from ckd_fed.evaluation.per_user import rank_users
n = int(sys.argv[1])
x = torch.randn(n, 4)
everyone, one_each = np.arange(n), Interactions.from_pairs(np.arange(n), np.arange(n), n, n)
before = peak()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("work", ["nearest(x, 10)", "rank_users(Embeddings(x, x), one_each, one_each, 20)"])
def test_memory_grows_by_a_few_blocks(work):
    script = SETUP + f"kept = {work}\nprint(peak() - before)"
    done = subprocess.run([sys.executable, "-c", script, str(N)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150
