"""The real thing: Flower's simulation with its processes, through the command that users type."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckd_fed.analysis.users import load_users
from ckd_fed.tracking.record import read_rows

ROOT = Path(__file__).parents[2]
QUICK = (
    "training.epochs=4 training.validate-every=2 training.batch-size=64 training.threads=1 distillation.batch-size=100 "
    "model.embedding-dim=8 federation.teacher-epochs=2"
)

pytestmark = pytest.mark.federation


@pytest.fixture
def started(tmp_path):
    """Start ``ckd-fed`` with homes of its own."""

    def start(*arguments):
        environment = {**os.environ, "CKD_FED_HOME": str(tmp_path / "home"), "FLWR_HOME": str(tmp_path / "flwr"), "WANDB_MODE": "offline"}
        command = [str(Path(sys.executable).parent / "ckd-fed"), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    return start


@pytest.fixture
def ckd_fed(started):
    """Run ``ckd-fed`` to its end; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        process = started(*arguments)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


@pytest.mark.parametrize("backbone", ["vbpr", "mmgcn"])
def test_from_nothing_to_a_distilled_student(backbone, tmp_path, write_dataset, ckd_fed):
    """Flower's default local connection as it comes; metrics, checkpoints and a W&B run are left behind, and no process."""
    folder = write_dataset("toy", n_users=60, n_items=40)
    code, out, err = ckd_fed("run", "simulations/baby", "-c", f"backbone={backbone} plain=true data.dir={folder} {QUICK}")
    assert code == 0, out + err
    for text in ("teacher image", "teacher text", "plain student", "distilled student", "reached image", "NDCG: standard"):
        assert text in out
    (run,) = (tmp_path / "home" / "runs").iterdir()
    rows = read_rows(run / "metrics.jsonl")
    rounds = [row for row in rows if row["event"] == "round"]
    assert [row["phase"] for row in rounds] == ["teachers"] * 2 + ["distillation"] * 2
    assert rows[-1]["event"] == "final"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.safetensors", "last.safetensors", "state.safetensors"}
    assert list((run / "wandb").rglob("*.wandb"))
    report = (run / "report" / "report.html").read_text()
    assert report.count("<svg") == len(list((run / "report").glob("*.png"))) == 6
    assert set(rows[0]["nodes"]) == {"teacher/image", "teacher/text", "student/0"}
    assert {"seconds/distil/student/0", "seconds/score/teacher/text"} <= set(rounds[-2])  # the last round asks for no scores
    assert load_users(run / "test_users.npz").values.keys() >= {"teacher/image/recall@20", "plain/recall@20", "student/recall@20"}
    assert not _left_behind(tmp_path)


def test_a_run_ended_by_sigterm_leaves_no_process(tmp_path, write_dataset, started):
    """As by ``timeout``, CI or systemd, in the midst of training."""
    folder = write_dataset("toy", n_users=60, n_items=40)
    process = started("run", "simulations/baby", "-c", f"data.dir={folder} {QUICK} training.epochs=100000 training.patience=100000")
    while "round   2" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "interrupted by SIGTERM; run" in err.splitlines()[-1]
    assert not _left_behind(tmp_path)


def test_a_failed_run_fails_with_its_reason_last(tmp_path, write_dataset, ckd_fed):
    """Flower itself ends with 0 here."""
    folder = write_dataset("toy")
    (folder / "text_feat.npy").unlink()
    code, _, err = ckd_fed("run", "simulations/baby", "-c", f"data.dir={folder} {QUICK}")
    assert code == 1
    reason = err.strip().splitlines()[-1]
    assert "unknown modality 'text'" in reason
    assert "choices: image" in reason
    assert "Traceback" not in err


def test_wrong_keys_are_told_before_anything_starts(ckd_fed):
    for override, mentions in {
        "backbone=vpbr": ["unknown backbone 'vpbr'", "did you mean 'vbpr'"],
        "training.epoch=3": ["training.epoch", "did you mean 'training.epochs'"],
        "training.epochs=0": ["training.epochs is 0"],
    }.items():
        code, out, err = ckd_fed("run", "simulations/baby", "-c", override)
        assert (code, out) == (1, "")
        assert len(err.strip().splitlines()) == 1
        for mention in mentions:
            assert mention in err


def test_every_configuration_key_can_be_set_by_flwr_run(ckd_fed):
    """Flower refuses run-config keys that an app does not declare."""
    import tomllib
    from inspect import Parameter, signature

    from ckd_fed.backbones import BACKBONES
    from ckd_fed.backbones.build import backbone_class
    from ckd_fed.config import flatten, resolve

    parameters = [parameter for name in BACKBONES for parameter in signature(backbone_class(name)).parameters.values()]
    options = {f"model.{parameter.name}" for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY}

    for app in sorted((ROOT / "simulations").iterdir()):
        declared = flatten(tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])
        keys = {key.replace("-", "_") for key in resolve({}).flat()}
        assert keys | options == set(declared), app.name
        assert resolve(declared).dataset == app.name


def test_train_without_flower(tmp_path, write_dataset, ckd_fed):
    folder = write_dataset("toy", n_users=60, n_items=40)
    code, out, err = ckd_fed("train", "-c", f"name=mine data.dir={folder} {QUICK}")
    assert code == 0, err
    assert "distilled student" in out
    assert json.loads((tmp_path / "home/runs/mine/metrics.jsonl").read_text().splitlines()[-1])["event"] == "final"
    code, _, err = ckd_fed("train", "-c", f"name=mine data.dir={folder} {QUICK}")
    assert code == 1
    assert "holds a run already" in err


def _left_behind(tmp_path):
    """What of a run's processes is still there after a while: Flower's and Ray's end by themselves, once they have missed their parents."""
    deadline = time.monotonic() + 120
    while (left := [line for line in _processes() if str(tmp_path) in line]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def _processes():
    """Command lines and environments of all processes of this machine that can be read."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.append(" ".join((entry / part).read_bytes().replace(b"\0", b" ").decode(errors="replace") for part in ("cmdline", "environ")))
        except OSError:
            continue
    return found
