"""W&B read back: offline from its own file, online from a stand-in server; and its every failure costs nothing but the mirror."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from ckd_fed.config import resolve
from ckd_fed.errors import CkdError
from ckd_fed.tracking import wandb_mirror
from ckd_fed.tracking.record import read_rows
from ckd_fed.tracking.replay import replay
from ckd_fed.training.central import train

sys.path.insert(0, str(Path(__file__).parent))
from wandb_server import WandbServer

KEY = "k" * 40
SMALL = {
    "dataset": "toy", "plain": True, "training.epochs": 6, "training.validate-every": 2, "training.batch-size": 64, "training.threads": 1,
    "model.embedding-dim": 4, "distillation.batch-size": 50, "federation.teacher-epochs": 2, "tracking.report": False,
}  # fmt: skip
BESIDES = {"_step", "_timestamp", "_runtime", "_wandb"}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()  # a service keeps the settings of its first run
    yield
    with contextlib.suppress(ConnectionError):  # of a service that a test has killed
        wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    made = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield made
    made.stop()


@pytest.fixture
def job(tmp_path, write_dataset):
    """Train a small job and return its directory."""
    folder = write_dataset("toy", n_users=60, n_items=40)

    def run(name="job", **overrides):
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        config = resolve({**SMALL, "data.dir": str(folder), "home": str(tmp_path), "name": name}, given)
        assert train(config).outcomes["student"].test
        return tmp_path / "runs" / name

    return run


def numbers(directory):
    """What W&B should have: (round, metrics) of every round, then the final row's numbers."""
    rows = [row for row in read_rows(directory / "metrics.jsonl") if row["event"] in ("round", "final")]
    return [{key: value for key, value in row.items() if isinstance(value, (int, float))} for row in rows]


def complete(directory):
    rows = read_rows(directory / "metrics.jsonl")
    return rows[-1]["event"] == "final" and [row["round"] for row in rows if row["event"] == "round"] == list(range(1, 7))


def inspect(file):
    shown = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def mirrored(rows):
    """History rows with numbers only; W&B's own keys left out, and the round that W&B repeats in the final row, and the tables' row."""
    kept = [{key: value for key, value in row.items() if isinstance(value, (int, float)) and key not in BESIDES} for row in rows]
    assert "tables/final.ncols" in kept[-1] or set(kept[-1]) <= {"round"}
    del kept[-2]["round"]
    return kept[:-1]


def test_an_offline_run_holds_every_metric_of_every_round(job):
    directory = job(tracking__wandb="offline")
    (file,) = (directory / "wandb").rglob("*.wandb")
    records = inspect(file)
    rows = mirrored(entry["history"]["item"] for entry in records if "history" in entry)
    assert complete(directory)
    assert len(rows) == 7
    for ours, theirs in zip(numbers(directory), rows, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-12)
    last = rows[-2]
    for m in ("image", "text"):
        for key in ("effect", "effect_share", "weight", "specific", "generic", "reached"):
            assert f"{key}/{m}" in last
        assert {f"only/{m}/recall@20", f"teacher/{m}/recall@20"} <= set(last)
    text = json.dumps(records)
    assert "tables/final" in text
    assert "tables/groups" in text
    assert "job-model" in text
    assert "job-configuration" in text
    tables = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in (directory / "wandb").rglob("*.table.json")}
    assert [row[0] for row in tables["final"]["data"]] == ["teacher/image", "teacher/text", "plain", "student"]
    assert {row[tables["groups"]["columns"].index("kind")] for row in tables["groups"]["data"]} == {"users", "items"}


def test_artifacts_can_be_left_out(job):
    directory = job(tracking__wandb="offline", tracking__artifacts=False)
    (file,) = (directory / "wandb").rglob("*.wandb")
    text = json.dumps(inspect(file))
    assert "tables/final" in text
    assert "job-model" not in text
    assert "job-configuration" not in text


def test_an_online_run_holds_the_same_rows(job, server):
    directory = job(tracking__tags="mine", tracking__group="ours")
    rows = mirrored(server.history())
    for ours, theirs in zip(numbers(directory), rows, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-12)
    assert server.exit_code == 0
    assert server.runs[0] == "job"
    assert (server.group, server.job_type) == ("ours", "distillation")
    assert {"mine", "toy", "vbpr"} <= set(server.tags)
    start = read_rows(directory / "metrics.jsonl")[0]
    for key, value in {"distillation.rho": 0.01, "split": start["split"], "code": start["code"], "features": start["features"]}.items():
        assert server.config[key]["value"] == value


def test_a_replay_is_the_run_again(job, server):
    directory = job(tracking__wandb="off")
    assert not server.history()
    replay(directory, {"tracking.wandb": "online"}, print)
    for ours, theirs in zip(numbers(directory), mirrored(server.history()), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-12)
    assert server.runs[0] == "job"
    assert server.config["replayed"]["value"] is True


def test_a_replay_that_w_and_b_does_not_take_is_an_error(job, monkeypatch):
    directory = job(tracking__wandb="off")
    monkeypatch.setattr(wandb_mirror, "_start", lambda *arguments: (_ for _ in ()).throw(TimeoutError("no network")))
    with pytest.raises(CkdError, match="not replayed in full: TimeoutError: no network"):
        replay(directory, {"tracking.wandb": "online"}, print)


@pytest.fixture
def mirror(tmp_path, capsys):
    """Mirror some rounds of a run, which then ends, and return what was said."""

    def of(rounds, end, **given):
        directory = tmp_path / "runs" / "job"
        directory.mkdir(parents=True, exist_ok=True)
        said = []
        made = wandb_mirror.WandbMirror(directory, resolve({"dataset": "toy", **given}, {}), {"split": "s"}, said.append)
        for number in rounds:
            made.log({"event": "round", "round": number, "val/recall@20": number / 10})
        made.finish(end)
        assert not made.given_up
        wandb.teardown()  # as the process that goes on is another
        return "\n".join(said)

    return of


def rounds(server):
    return [(row["_step"], row["round"], row["val/recall@20"]) for row in server.history() if "val/recall@20" in row]


def test_a_run_that_is_gone_on_with_goes_on_in_its_w_and_b_run(mirror, server):
    said = mirror([1, 2], {"failed": "the power went"})
    assert server.exit_code == 1
    assert server.summary["failed"] == "the power went"
    (first,) = set(server.ids)
    said = mirror([2, 3], {"final/student/test/recall@20": 0.5}, resume="job")
    assert f"online run {first} goes on" in said
    assert "replay" not in said
    assert set(server.ids) == {first}
    assert rounds(server) == [(0, 1, 0.1), (1, 2, 0.2), (2, 2, 0.2), (3, 3, 0.3)]
    assert server.exit_code == 0
    assert server.summary["final/student/test/recall@20"] == 0.5
    assert "failed" not in server.summary


def test_rounds_that_never_reached_w_and_b_are_sent_when_the_run_is_gone_on_with(mirror, server, tmp_path):
    """A process that is killed takes the rows with it that waited to be sent; metrics.jsonl has them."""
    mirror([1, 2], {"failed": "the power went"})
    rows = [{"event": "start"}, *({"event": "round", "round": n, "val/recall@20": n / 10} for n in (1, 2, 3, 4)), {"event": "resume", "round": 4}]
    (tmp_path / "runs/job/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mirror([5], {}, resume="job")
    assert rounds(server) == [(n - 1, n, n / 10) for n in (1, 2, 3, 4, 5)]


def test_one_that_w_and_b_no_longer_has_goes_on_in_another(mirror, server):
    mirror([1, 2], {"failed": "the power went"})
    (first,) = set(server.ids)
    server.ids.clear()
    server.rows.clear()
    said = mirror([3], {}, resume="job")
    assert f"its run {first} cannot be gone on with" in said
    assert "`ckd-fed wandb replay job` makes one run of all" in said
    (second,) = set(server.ids) - {first}
    assert rounds(server) == [(0, 3, 0.3)]
    assert f"online run {second} goes on" in mirror([4], {}, resume="job")


@pytest.mark.parametrize("given", [{"tracking.project": "another"}, {"tracking.wandb": "offline"}], ids=["another project", "offline"])
def test_elsewhere_it_is_another_run(mirror, server, given):
    mirror([1], {"failed": "the power went"})
    (first,) = set(server.ids)
    said = mirror([2], {}, resume="job", **given)
    assert f"run {first}" not in said
    assert "`ckd-fed wandb replay job` makes one run of all" in said


def test_a_damaged_note_of_its_w_and_b_run_costs_nothing(mirror, server, tmp_path):
    mirror([1], {})
    (tmp_path / "runs/job/wandb/runs.json").write_text("[")
    assert "makes one run of all" in mirror([2], {}, resume="job")


@pytest.mark.parametrize("fault", ["refuse", "hang", "slow", "dead"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_faulty_server_fails_no_training(fault, when, job, server, monkeypatch, capsys):
    monkeypatch.setattr(wandb_mirror, "_INIT_SECONDS", 3.0)
    monkeypatch.setattr(wandb_mirror, "_FINISH_SECONDS", 3.0)

    def break_down():
        if fault == "dead":
            server.stop()
        server.fault = fault

    if when == "before":
        break_down()
    else:
        start = wandb_mirror._start

        def start_then_break(*arguments):
            run = start(*arguments)
            break_down()
            return run

        monkeypatch.setattr(wandb_mirror, "_start", start_then_break)
    started = time.monotonic()
    directory = job()
    assert complete(directory)
    assert time.monotonic() - started < 60
    assert list((directory / "wandb").rglob("*.wandb"))  # what was not sent can still be
    said = capsys.readouterr().out
    if fault != "slow" and when == "before":
        assert "the run is written offline" in said


def test_without_a_key_the_run_is_written_offline_and_online_is_no_failure(job, capsys):
    assert complete(job("auto"))
    assert "W&B: offline run" in capsys.readouterr().out
    assert complete(job("online", tracking__wandb="online"))
    assert "W&B cannot be reached" in capsys.readouterr().out


def test_a_killed_service_costs_no_row(job, monkeypatch):
    start = wandb_mirror._start

    def start_then_kill(*arguments):
        run = start(*arguments)
        killed = [process for process in _children(os.getpid()) if "wandb-core" in _command(process)]
        assert killed
        for process in killed:
            os.kill(process, signal.SIGKILL)
        return run

    monkeypatch.setattr(wandb_mirror, "_start", start_then_kill)
    monkeypatch.setattr(wandb_mirror, "_FINISH_SECONDS", 3.0)
    assert complete(job(tracking__wandb="offline"))


def test_a_full_disk_under_wandb_costs_no_row(job, tmp_path):
    """A tiny file system in the place of the run's wandb folder; needs the right to mount."""
    folder = tmp_path / "runs" / "job" / "wandb"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        directory = job(tracking__wandb="offline")
        assert complete(directory)
        assert (directory / "checkpoints" / "best.safetensors").is_file()
    finally:
        wandb.teardown()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _children(process):
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_children(child)]
    return found


def _command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""
