"""Every key of every row is explained in docs/metrics.md."""

import re
from pathlib import Path

import numpy as np
import pytest

from ckd_fed.config import resolve
from ckd_fed.evaluation import tested
from ckd_fed.tracking.record import read_rows
from ckd_fed.training.central import train

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
PLACES = {
    "<m>": r"\w+", "<k>": r"\d+", "<metric>": "(?:recall|ndcg|precision|hit_rate|ndcg_retrieved)", "<model>": r"(?:teacher/\w+|plain|student)",
    "<term>": r"\w+", "<view>": r"[\w ]+", "<action>": r"\w+", "<role>": r"\w+(?:/\w+)?",
}  # fmt: skip
SMALL = {
    "dataset": "toy", "model.embedding-dim": 4, "training.epochs": 4, "training.validate-every": 2, "training.batch-size": 32, "training.threads": 1,
    "distillation.batch-size": 50, "plain": True, "evaluation.calibrate": True, "tracking.wandb": "off", "tracking.report": False,
}  # fmt: skip


def documented():
    patterns = []
    for name in set(re.findall(r"`([\w/<>@]+)`", DOCUMENT.read_text())) - set(PLACES):
        pattern = re.escape(name)
        for place, what in PLACES.items():
            pattern = pattern.replace(re.escape(place), what)
        patterns.append(pattern)
    return re.compile("|".join(patterns))


@pytest.mark.parametrize("workers", [0, 1, 2], ids=["central", "one student", "two students"])
def test_every_key_is_documented(workers, tmp_path, write_dataset, federate, monkeypatch):
    monkeypatch.setattr(tested, "ENOUGH", 0)
    (tmp_path / "data").mkdir()
    folder = write_dataset("data/toy", n_users=60, n_items=40)
    np.save(folder / "image_mask.npy", np.arange(40) % 5 != 1)
    if workers:
        nodes = [{"partition-id": index, "num-partitions": 4} for index in range(4)]
        federate({**SMALL, "federation.student-workers": workers}, nodes=nodes)
    else:
        train(resolve(SMALL, {"home": str(tmp_path), "name": "fed"}))
    rows, known = read_rows(tmp_path / "runs" / "fed" / "metrics.jsonl"), documented()
    assert {"start", "validation", "round", "groups", "final"} <= {row["event"] for row in rows}
    keys = {key for row in rows for key in row}
    assert len(keys) > 150
    assert not sorted(key for key in keys if not known.fullmatch(key))
