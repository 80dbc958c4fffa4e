"""The benchmarks run, and both sides of the speed benchmark compute the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
            assert rows[f"{backbone} whole recipe of 100 epochs each, reckoned"][side] == pytest.approx(trained + validated)
            assert rows[f"{backbone} distilled epoch of 12 steps, reckoned"][side] == pytest.approx(12 * steps["distilled"][side])
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
