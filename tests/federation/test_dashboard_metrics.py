"""Every metric of the W&B workspace is one that a federated run logs."""

from ckd_fed.tracking.dashboard import sections
from ckd_fed.tracking.record import read_rows


def test_every_metric_of_the_workspace_is_logged(tmp_path, write_dataset, federate):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40, n_modalities=3)
    small = {"model.embedding-dim": 8, "training.batch-size": 64, "training.epochs": 4, "training.validate-every": 2, "training.threads": 1}
    federate({"dataset": "toy", "data.modalities": "image,text,audio", "plain": True, "distillation.batch-size": 50, **small})
    rows = [row for row in read_rows(tmp_path / "runs" / "fed" / "metrics.jsonl") if row["event"] in ("round", "final")]
    logged = {key for row in rows for key, value in row.items() if isinstance(value, (int, float))}
    wanted = {metric for section in sections(["image", "text", "audio"]) for panel in section.panels for metric in panel.metrics}
    assert wanted - logged == set()
    assert len(wanted) > 30
