"""A run of the real simulation, ended from outside and gone on with, comes to the undisturbed run's result."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ckd_fed.checkpoint import load_checkpoint
from ckd_fed.tracking.record import read_rows

ROOT = Path(__file__).parents[2]
# Rounds do not grow, or the third could hold all that is left and end before the signal is heard.
QUICK = (
    "training.epochs=48 training.patience=48 training.validate-every=1 training.batch-size=64 training.threads=1 distillation.batch-size=100 "
    "model.embedding-dim=8 federation.teacher-epochs=48 federation.messaging-share=1 tracking.wandb=off"
)

pytestmark = pytest.mark.federation


def test_a_simulation_that_was_ended_goes_on(tmp_path, write_dataset):
    folder = write_dataset("toy", n_users=60, n_items=40)
    runs = tmp_path / "home" / "runs"
    environment = {**os.environ, "CKD_FED_HOME": str(tmp_path / "home"), "FLWR_HOME": str(tmp_path / "flwr")}

    def start(override):
        command = [str(Path(sys.executable).parent / "ckd-fed"), "run", "simulations/baby", "-c", override]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def rounds(run):
        path = runs / run / "metrics.jsonl"
        rows = read_rows(path) if path.is_file() else []
        return [
            {key: value for key, value in row.items() if key != "time" and "seconds" not in key and not key.startswith("bytes")}
            for row in rows
            if row["event"] == "round" and row["phase"] == "distillation"
        ]

    out = start(f"name=undisturbed data.dir={folder} {QUICK}").communicate(timeout=300)[0]
    assert len(rounds("undisturbed")) == 48, out

    process = start(f"name=ended data.dir={folder} {QUICK}")
    deadline = time.monotonic() + 200
    while len(rounds("ended")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=120)[0]
    before = len(rounds("ended"))
    assert 2 <= before < 48, out
    assert process.returncode == 1

    process = start("resume=ended")
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert "going on after round" in out
    assert rounds("ended") == rounds("undisturbed")
    for name in ("best", "last"):
        ours, theirs = (load_checkpoint(runs / run / "checkpoints" / f"{name}.safetensors")[0] for run in ("ended", "undisturbed"))
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])
