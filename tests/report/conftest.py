"""Runs without training: records written as a run writes them."""

import math

import pytest

from ckd_fed.config import resolve
from ckd_fed.tracking.record import Record
from ckd_fed.tracking.result import Outcome, RunResult

# How well each modality can be ranked alone, and how much of it a plain and a distilled student learn.
STRENGTH = {"image": 0.15, "text": 0.31, "audio": 0.08}
PLAIN = {"image": 0.6, "text": 0.95, "audio": 0.4}
DISTILLED = {"image": 0.97, "text": 1.05, "audio": 0.7}


@pytest.fixture
def write_run(tmp_path):
    """Factory: the directory of a run with the parts asked for."""

    def write(
        name="run",
        modalities=("image", "text"),
        *,
        plain=True,
        distilled=True,
        effects=True,
        views=True,
        traffic=0.0,
        rounds=6,
        end="final",
    ):
        config = resolve({"dataset": "toy", "distillation.enabled": distilled, "plain": plain})
        record = Record(tmp_path / name, config, write=lambda line: None)
        record.start("toy: 12 users, 30 items", modalities=list(modalities), split="abc")
        teachers = {f"teacher/{m}": STRENGTH[m] for m in modalities} if distilled else {}
        if plain and distilled:
            teachers["plain"] = 0.33
        number = 0
        for number in range(1, 3 if teachers and rounds else 1):
            reports = {}
            for role, best in teachers.items():
                row = {"epoch": 10.0 * number, "loss/total": 1 / number, "val/recall@20": best * number / 2, "gain": 1.0, "seconds": 2.0 * number}
                if role == "plain":
                    row.update({f"only/{m}/recall@20": STRENGTH[m] * PLAIN[m] * number / 2 for m in modalities if views})
                reports[role] = [row]
            record.pretraining_round(number, reports, 5.0, int(traffic))
        for index in range(rounds):
            share = 1 - math.exp(-index - 1)
            row = {
                "epoch": 5.0 * (index + 1),
                "loss/total": 1.0,
                "loss/bpr": 1 / (index + 1),
                "val/recall@20": 0.4 * share,
                "gain": 1.0,
                "seconds": 1.5,
            }
            for place, m in enumerate(modalities):
                if views:
                    row[f"only/{m}/recall@20"] = STRENGTH[m] * DISTILLED[m] * share
                if distilled:
                    row[f"teacher/{m}/recall@20"] = STRENGTH[m]
                if distilled and views:
                    row[f"reached/{m}"] = DISTILLED[m] * share
                if distilled and effects:
                    row.update({f"effect/{m}": 0.9 + 0.05 * place, f"weight/{m}": 1.1 - 0.1 * place})
            if distilled:
                row["loss/kd"] = 2 / (index + 1)
            if traffic:
                row.update({"bytes": traffic, "bytes/margins": traffic / 4, "seconds/distil/student/0": 1.4})
            record.distillation_round(number + 1 + index, row, modalities)
        if end == "final":
            outcomes = {role: Outcome(20, 30, best, {"recall@20": best, "ndcg@20": best / 2}) for role, best in teachers.items()}
            if "plain" in outcomes:
                outcomes["plain"].test.update({f"only/{m}/recall@20": STRENGTH[m] * PLAIN[m] for m in modalities if views})
            only = {f"only/{m}/recall@20": STRENGTH[m] * DISTILLED[m] for m in modalities if views}
            outcomes["student"] = Outcome(30, 40, 0.4, {"recall@20": 0.41, "ndcg@20": 0.2, **only})
            record.finish(RunResult(tuple(modalities), record.directory, outcomes), 33.0)
        elif end:
            record.fail(end)
        else:
            record.close()
        return record.directory

    return write
