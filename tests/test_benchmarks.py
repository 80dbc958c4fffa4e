"""The benchmarks run, and both sides of the speed benchmark compute the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_fed.training.trainer import Trainer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, *options):
    return subprocess.run([sys.executable, str(BENCHMARKS / name), *map(str, options)], capture_output=True, text=True, check=True).stdout


def test_speed(tmp_path):
    printed = run("speed.py", "--quick", "--threads", 1, "--json", tmp_path / "rows.json")
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    for backbone in ("vbpr", "mmgcn"):
        steps = {role: rows[f"{backbone} {role} step"] for role in ("image teacher", "text teacher", "plain", "distilled")}
        assert all(row["difference"] < 1e-5 for row in steps.values())
        joint, views = rows[f"{backbone} evaluation, joint"], rows[f"{backbone} evaluation, all views"]
        assert joint["difference"] < 1e-6  # Recall@20 by either way of ranking
        for side in ("published_ms", "ours_ms"):  # 12 steps an epoch, 20 validations in 100 of them
            trained, validated = 1200 * sum(row[side] for row in steps.values()), 40 * (joint[side] + views[side])
            assert rows[f"{backbone} whole recipe of 100 epochs each, estimated"][side] == pytest.approx(trained + validated)
            assert rows[f"{backbone} distilled epoch of 12 steps, estimated"][side] == pytest.approx(12 * steps["distilled"][side])
    assert all(f"| {case} |" in printed for case in rows)


def test_scale():
    rows = [line for line in run("scale.py", "--quick", "--threads", 1, "--steps", 1).splitlines() if line.startswith(("| vbpr", "| freedom"))]
    assert len(rows) == 4
    assert not any("failed" in row for row in rows)


def test_steps():
    rows = [line for line in run("steps.py", "--quick", "--backbones", "lattice", "vbpr").splitlines() if line.startswith(("| lattice", "| vbpr"))]
    assert len(rows) == 2
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[-1] == "none"  # nothing is sorted or searched for within a step
        assert sum(int(cell.removesuffix("%")) for cell in cells[4:-1]) in range(97, 104)


def test_gpu_without_one():
    """The whole script; that steps are recorded on a GPU, and what that brings, only one can show."""
    printed = run("gpu.py", "--quick", "--device", "cpu", "--backbones", "vbpr", "freedom").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed if line.startswith(("| vbpr", "| freedom"))]
    steps, evaluations = [row for row in cells if len(row) == 7], [row for row in cells if len(row) == 3]
    assert [row[:2] for row in steps] == [[b, role] for b in ("vbpr", "freedom") for role in ("teacher/image", "teacher/text", "plain", "distilled")]
    assert all(float(row[2]) > 0 and row[3] == "not recorded" for row in steps)
    assert all(float(joint) > 0 and float(views) > 0 for _, joint, views in evaluations)
    assert len(evaluations) == 2


def test_gpu_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no GPU" in done.stderr


@pytest.fixture(scope="module")
def quality_module():
    spec = importlib.util.spec_from_file_location("quality", BENCHMARKS / "quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quality(quality_module, monkeypatch):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, options)])
        quality_module.main()

    return run


def test_quality_goes_on_where_it_was_cut_off(tmp_path, write_dataset, quality, monkeypatch, capsys):
    write_dataset("toy", n_users=60, n_items=40)

    def measured(name, *more):
        options = ["--dataset", "toy", "--backbone", "vbpr", "--seeds", "5", "--trials", "1", "--rhos", "1", "--threads", "1"]
        places = ("--data", tmp_path, "--cache", tmp_path / name, "--results", tmp_path / f"{name}.jsonl")
        quality("run", *options, *places, *more)
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    whole = measured("whole")
    assert [row["model"] for row in whole[:4]] == ["teacher/image", "teacher/text", "distilled rho=1", "plain"]
    assert {row["model"] for row in whole[4:]} == {"paired"}
    assert measured("plain", "--only", "plain") == whole[3:4]
    for epochs, untouched in ((13, 3), (sum(row["epochs"] for row in whole[:2]) + 17, 1)):  # in the first teacher, in the student
        name, left, real = f"cut-{epochs}", [epochs], Trainer.train_epoch

        def train_epoch(self, *arguments, left=left, real=real, **more):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(self, *arguments, **more)

        monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
        with pytest.raises(KeyboardInterrupt):
            measured(name)
        monkeypatch.setattr(Trainer, "train_epoch", real)
        capsys.readouterr()
        assert measured(name) == whole
        assert capsys.readouterr().err.count("epoch 5,") == untouched  # the others' first validations are not made again
        assert not list((tmp_path / name).glob("*.state.safetensors"))


def of_setting(seed, rho, val):
    return {"dataset": "toy", "backbone": "vbpr", "seed": seed, "model": f"distilled rho={rho}", "val": val}


def test_quality_chooses_on_the_seed_with_most_settings_in_any_order(quality_module):
    first = [of_setting(123, 1, 0.05), of_setting(123, 10, 0.07), of_setting(123, 0.1, 0.06), of_setting(2024, 10, 0.06)]
    other = [of_setting(7, 1, 0.09), of_setting(7, 1, 0.09)]  # one setting, twice in the files
    even = [of_setting(5, rho, val) for rho, val in ((0.1, 0.02), (1, 0.03), (10, 0.01))]
    equal = [of_setting(1, rho, 0.04) for rho in (10, 1, 0.1)]
    for rows, model in ((first + other, "rho=10"), (first + other + even, "rho=1"), (equal, "rho=0.1")):
        for order in (rows, rows[::-1], rows[3:] + rows[:3]):
            chosen = quality_module.chosen_rows(order, "distilled")
            assert chosen == [row for row in order if row["model"] == f"distilled {model}"]
    assert quality_module.chosen_rows(first, "plain") == []


def test_quality_of_one_user_has_no_interval(quality_module, tmp_path):
    results = quality_module.Results(tmp_path / "results.jsonl")
    measured = {"val": 0.1, "best_epoch": 5, "test": {"recall@20": 0.6}, "readout": {}}
    for model, recall in (("distilled rho=1", 0.6), ("plain", 0.1)):
        row = {"dataset": "toy", "backbone": "vbpr", "seed": 5, "model": model, **measured}
        results.add(row)
        np.savez(quality_module.cached(tmp_path, {key: row[key] for key in ("dataset", "backbone", "seed")}, model, "npz"), joint=[recall])
    quality_module.test_over_users(results, tmp_path, "toy", "vbpr")
    written = (tmp_path / "results.jsonl").read_text()
    assert "NaN" not in written
    tested = json.loads(written.splitlines()[-1])
    assert (tested["model"], tested["difference"], tested["low"], tested["high"], tested["p"]) == ("paired", 0.5, None, None, None)
    assert "| distilled rho=1, joint | plain, joint | 5 | +0.5000 |  |" in quality_module.details(results, "toy", "vbpr")
    quality_module.test_over_users(results, tmp_path, "toy", "vbpr")
    assert (tmp_path / "results.jsonl").read_text() == written
