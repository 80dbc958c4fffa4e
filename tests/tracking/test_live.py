"""Bars on a terminal, plain lines everywhere else."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ckd_fed.tracking.live import FollowedLog, LiveProgress

TEACHERS = {"event": "round", "phase": "teachers", "round": 1, "teacher/image/epoch": 10.0, "teacher/image/val/recall@20": 0.25}
STUDENT = {"event": "round", "phase": "distillation", "round": 2, "epoch": 35.0, "val/recall@20": 0.41}


@pytest.fixture
def live():
    out = io.StringIO()
    with LiveProgress(Console(file=out, force_terminal=True, width=150), 240) as made:
        made.shown = lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
        yield made


def bars(live):
    live._progress.refresh()
    return {task.description: task for task in live._progress.tasks}


def test_bars_follow_the_rows(live):
    live.log({"event": "start"})
    assert not bars(live)
    live.log(TEACHERS)
    image = bars(live)["teacher image"]
    assert (image.completed, image.total, image.visible) == (10, 240, True)
    assert "val R@20 0.2500 (best 0.2500)" in live.shown()
    live.log({**TEACHERS, "teacher/image/epoch": 60.0, "teacher/image/val/recall@20": 0.2, "teacher/image/done": 1.0})
    assert (bars(live)["teacher image"].completed, bars(live)["teacher image"].total) == (60, 60)
    assert "val R@20 0.2000 (best 0.2500)" in live.shown()
    live.log(STUDENT)
    assert not bars(live)["teacher image"].visible
    assert "epoch 35/240" in live.shown()
    assert "at most" in live.shown()


def test_lines_are_printed_as_they_are(live):
    live.write("[bold]not markup[/bold] :smile:")
    assert "[bold]not markup[/bold] :smile:" in live.shown()


def test_a_run_of_other_processes_is_followed_by_its_directory(live, tmp_path):
    (tmp_path / "config.yaml").write_text("training:\n  epochs: 99\n")
    followed = FollowedLog(live)
    followed.line("nothing to see\n")
    followed.line(f"INFO: run directory: {tmp_path}\n")  # no rows yet
    line = json.dumps(STUDENT)
    (tmp_path / "metrics.jsonl").write_text(line[:20])  # half a row
    followed.line("round 2\n")
    assert not bars(live)
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    followed.line("round 2\n")
    assert (bars(live)["student"].completed, bars(live)["student"].total) == (35, 99)
    FollowedLog(live).line("run directory: /nowhere/at/all\n")


def test_train_on_a_terminal_and_in_a_pipe(tmp_path, write_dataset):
    folder = write_dataset("toy", n_users=60, n_items=40)
    settings = (
        f"data.dir={folder} training.epochs=4 training.validate-every=2 training.batch-size=64 training.threads=1 model.embedding-dim=4 "
        "distillation.batch-size=50 tracking.wandb=off tracking.report=false"
    )
    command = [sys.executable, "-c", "from ckd_fed.cli import main; main()", "train", "-c", settings]
    environment = {
        **os.environ,
        "CKD_FED_HOME": str(tmp_path),
        "TERM": "xterm-256color",
        "COLUMNS": "150",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    piped = subprocess.run([*command, "-c", "name=piped"], env=environment, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in piped
    assert "distilling epoch 4" in piped

    main, terminal = pty.openpty()
    process = subprocess.Popen([*command, "-c", "name=shown"], env=environment, stdout=terminal, stderr=subprocess.STDOUT)
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    assert "epoch 2/4" in text
    assert "distilling epoch 4" in text
    assert "distilled student" in text
