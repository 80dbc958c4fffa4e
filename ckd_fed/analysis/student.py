"""A run's best student, loaded for use where the run's dataset is at hand."""

from __future__ import annotations

from dataclasses import dataclass

from ckd_fed.analysis.history import RunHistory, other_data
from ckd_fed.backbones.base import Backbone, Embeddings, View
from ckd_fed.checkpoint import load_checkpoint, to_tensors
from ckd_fed.config import Config, restore
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.errors import DataError
from ckd_fed.home import home
from ckd_fed.training.build import build_trainer, choose_device


@dataclass(frozen=True)
class Student:
    """A trained student with the data it belongs to."""

    config: Config
    dataset: Dataset
    backbone: Backbone

    def tables(self, view: View | None = None) -> Embeddings:
        """Embeddings of a view, by default the joint one; inner products order a user's items as the view's scores do."""
        view = self.backbone.joint if view is None else view
        return self.backbone.ranking_embeddings([view])[view]


def load_student(history: RunHistory) -> Student:
    """The best student of a run.

    Raises:
        DataError: the run has no checkpoint, the dataset is not on this machine, or its split or features are not those the run was trained on.
    """
    config = restore(history.config)
    path = history.directory / "checkpoints" / "best.safetensors"
    if not path.is_file():
        raise DataError(f"run {history.name} has no {path.relative_to(history.directory)} ({history.state}); a run keeps its best student there")
    dataset = open_dataset(config, modalities=history.modalities)
    if other := other_data(history, dataset):
        raise DataError(f"run {history.name} was trained on {other}; put the run's own data there")
    # Not where it was trained: that may be a GPU of another machine.
    device = choose_device("cpu" if config.training.device == "cpu" else "auto")
    trainer = build_trainer(config, dataset, "student", device=device, cache=home(config) / "cache")
    try:
        trainer.restore(to_tensors(load_checkpoint(path)[0]))
    except RuntimeError as error:  # torch names the parameters that do not fit
        raise DataError(f"{path} does not fit backbone {config.backbone}: {' '.join(str(error).split())[:300]}") from None
    trainer.backbone.eval()
    return Student(config, dataset, trainer.backbone)
