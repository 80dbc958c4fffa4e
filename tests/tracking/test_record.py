"""The record of a run is complete whatever happens to its mirrors, and says what a person needs."""

import json
import subprocess
import sys

import pytest

from ckd_fed.config import resolve
from ckd_fed.errors import ConfigError
from ckd_fed.tracking import console, wandb_mirror
from ckd_fed.tracking.record import Record, read_rows
from ckd_fed.tracking.result import Outcome, RunResult
from ckd_fed.tracking.wandb_mirror import WandbMirror

ROUND = {
    "epoch": 5.0, "loss/total": 0.5, "loss/bpr": 0.4, "loss/kd": 0.1, "val/recall@20": 0.25, "gain": 1.0, "seconds": 1.5, "bytes": 1.4e6,
    "effect/image": 0.4, "weight/image": 1.2, "only/image/recall@20": 0.1, "teacher/image/recall@20": 0.2, "reached/image": 0.5,
    "effect/text": 0.8, "weight/text": 0.8, "only/text/recall@20": 0.2, "teacher/text/recall@20": 0.2, "reached/text": 1.0,
}  # fmt: skip


@pytest.fixture
def record(tmp_path):
    def make(mirrors=(), name="run"):
        lines = []
        made = Record(tmp_path / name, resolve({"dataset": "toy"}), mirrors, lines.append)
        return made, lines

    return make


def result(directory):
    test = {f"{metric}@{k}": 0.1 for metric in ("recall", "ndcg") for k in (10, 20)}
    student = {**test, "recall@20": 0.3, "only/image/recall@20": 0.05, "only/text/recall@20": 0.12}
    outcomes = {"teacher/image": Outcome(10, 20, 0.2, test), "teacher/text": Outcome(15, 20, 0.2, test), "student": Outcome(30, 40, 0.3, student)}
    return RunResult(("image", "text"), directory, outcomes)


def test_every_row_is_on_disk_before_the_run_goes_on(record):
    made, _ = record()
    made.start("a toy")
    made.distillation_round(7, ROUND, ["image", "text"])
    rows = read_rows(made.directory / "metrics.jsonl")  # not closed yet
    assert [row["event"] for row in rows] == ["start", "round"]
    assert {key: rows[1][key] for key in ROUND} == ROUND
    assert rows[1]["round"] == 7
    assert rows[1]["phase"] == "distillation"
    assert (made.directory / "config.yaml").read_text().startswith("dataset: toy")


def test_numbers_that_json_lacks_become_null_and_a_torn_last_line_is_left_out(record):
    made, _ = record()
    made.row("round", value=float("nan"), other=1.0)
    with (made.directory / "metrics.jsonl").open("a") as file:
        file.write('{"event": "rou')
    rows = read_rows(made.directory / "metrics.jsonl")
    assert len(rows) == 1
    assert rows[0]["value"] is None
    assert rows[0]["other"] == 1.0


def test_a_directory_with_a_run_in_it_is_not_written_over(record):
    made, _ = record()
    made.row("start")
    before = (made.directory / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        record()
    assert (made.directory / "metrics.jsonl").read_bytes() == before


def test_the_lines_of_both_phases(record):
    made, lines = record()
    row = {"epoch": 50.0, "loss/total": 0.1, "val/recall@20": 0.02}
    made.pretraining_round(1, {"teacher/image": [row, {**row, "epoch": 55.0, "val/recall@20": 0.01, "done": 1.0}], "plain": [row]}, 3.2, 1500)
    made.distillation_round(2, ROUND, ["image", "text"])
    assert "image: epoch 55 loss 0.1000 val R@20 0.0100 (round's best 0.0200) converged" in lines[0]
    assert "plain: epoch 50" in lines[0]
    assert lines[0].endswith("3.2 s, 1.5 kB")
    assert "loss 0.5000 (bpr 0.4000 kd 0.1000) val R@20 0.2500 *" in lines[1]
    assert "image: effect 0.40 weight 1.20 only 0.1000/0.2000 (50%)" in lines[1]
    assert lines[1].endswith("1.5 s, 1.4 MB")
    events = [row["event"] for row in read_rows(made.directory / "metrics.jsonl")]
    assert events == ["validation", "validation", "validation", "round", "round"]


def test_the_final_table_and_row(record):
    made, lines = record()
    made.finish(result(made.directory), 12.0)
    final = read_rows(made.directory / "metrics.jsonl")[-1]
    assert final["final/student/test/recall@20"] == 0.3
    assert final["final/reached/image"] == pytest.approx(0.5)
    assert final["final/reached/text"] == pytest.approx(1.2)
    table = lines[-1]
    assert "standard" in table.splitlines()[0]  # says which NDCG it is
    student = next(line for line in table.splitlines() if "distilled student" in line)
    for text in ("0.3000", "50%", "120%"):
        assert text in student
    assert max(map(len, table.splitlines())) <= console.WIDTH


@pytest.mark.parametrize("ks", [(20, 100000), (20,), (1, 2, 5, 10, 20, 50, 100)])
def test_the_final_table_has_the_cutoffs_that_were_asked_for(ks, tmp_path):
    test = {f"{metric}@{k}": 0.1 for metric in ("recall", "ndcg") for k in ks}
    student = {**test, **{f"{view}/{name}": value for view in ("only/image", "warm") for name, value in test.items()}}
    outcomes = {"teacher/image": Outcome(10, 20, 0.2, test), "student": Outcome(30, 40, 0.3, student)}
    table = console.final_table(RunResult(("image",), tmp_path, outcomes)).splitlines()
    header = [cell.strip() for cell in table[2].split("┃")[1:-1]]
    assert [name for name in header if "@" in name] == [*(f"Recall@{k}" for k in ks), *(f"NDCG@{k}" for k in ks)]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    assert [row.count("0.1000") for row in rows] == [2 * len(ks)] * 4
    assert not any("nan" in line or "…" in line for line in table)


class _Broken:
    def __init__(self, fail):
        self.fail, self.calls = fail, 0
        self.id = "x"
        self.summary = self

    def update(self, values):
        pass

    def log(self, row):
        self.calls += 1
        if self.fail:
            raise OSError("no space left on device")

    def finish(self, exit_code=0):
        raise RuntimeError("core process is gone")


def test_a_failing_wandb_is_given_up_once_and_costs_no_row(record, monkeypatch):
    said, broken = [], _Broken(fail=True)
    monkeypatch.setattr(wandb_mirror, "_init", lambda *arguments: (_ for _ in ()).throw(TimeoutError("no network")))
    dead = WandbMirror(None, resolve(), {}, said.append)
    dead.log({"event": "round", "round": 1})
    dead.finish({})
    assert len(said) == 1
    assert "no network" in said[0]

    half = WandbMirror(None, resolve(), {}, said.append)
    half._run = broken
    made, _ = record([lambda directory: half])
    for number in range(1, 11):
        made.distillation_round(number, ROUND, ["image", "text"])
    made.finish(result(made.directory), 1.0)
    assert broken.calls == 3  # then W&B was given up
    assert sum("given up" in line for line in said) == 3  # twice at the start of a mirror, once in the middle
    assert [row["round"] for row in read_rows(made.directory / "metrics.jsonl") if row["event"] == "round"] == list(range(1, 11))


def test_an_offline_wandb_run_has_every_round(record, tmp_path, monkeypatch):
    """The same numbers on a round axis, read back from W&B's own file."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = []
    config = resolve({"dataset": "toy"})
    made, _ = record([lambda directory: WandbMirror(directory, config, {"split": "abc"}, said.append)])
    for number in (1, 2, 3):
        made.distillation_round(number, {**ROUND, "val/recall@20": number / 10}, ["image", "text"])
    made.finish(result(made.directory), 1.0)
    assert "offline run" in said[0]
    (file,) = (made.directory / "wandb").rglob("*.wandb")
    shown = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    rows = [entry["history"]["item"] for entry in records if "history" in entry]
    assert [row["round"] for row in rows if "val/recall@20" in row] == [1, 2, 3]
    assert [row["val/recall@20"] for row in rows if "val/recall@20" in row] == [0.1, 0.2, 0.3]
    assert any(row.get("final/student/test/recall@20") == 0.3 for row in rows)


def test_a_wandb_that_cannot_be_reached_is_written_offline(tmp_path, monkeypatch):
    tried = []

    def start(directory, config, facts, mode):
        tried.append(mode)
        if mode == "online":
            raise TimeoutError("no network")
        return type("Run", (), {"id": "x", "resumed": False, "settings": type("Settings", (), {"mode": mode})})

    monkeypatch.setattr(wandb_mirror, "_start", start)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = []
    mirror = WandbMirror(tmp_path, resolve(), {}, said.append)
    assert tried == ["online", "offline"]
    assert "no network" in said[0]
    assert "offline run x" in said[1]
    assert mirror._run is not None
