"""A backbone of one's own: the documentation's example, word for word, and what is said when it cannot be used."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from ckd_fed import backbones
from ckd_fed.backbones.base import Backbone
from ckd_fed.backbones.build import backbone_class, build_backbone, importable
from ckd_fed.config import resolve
from ckd_fed.errors import ConfigError
from ckd_fed.training.central import train

DOCUMENT = Path(__file__).parents[2] / "docs" / "backbones.md"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The example of docs/backbones.md as the module ``mine``."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) < 60
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("mine")
def test_the_documented_example_trains(tmp_path, write_dataset):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=40, n_items=30)
    overrides = {
        "backbone": "mine:EarlyFusion", "model.embedding_dim": 8, "model.layers": 1, "dataset": "toy", "home": str(tmp_path), "training.epochs": 10,
        "training.batch-size": 32, "distillation.batch-size": 50, "evaluation.calibrate": True, "tracking.wandb": "off",
        "tracking.report": False, "training.threads": 1,
    }  # fmt: skip
    result = train(resolve(overrides))
    assert set(result.outcomes) == {"teacher/image", "teacher/text", "student"}
    assert "only/text/recall@20" in result.outcomes["student"].test
    assert "calibrated/recall@20" in result.outcomes["student"].test
    assert ":" not in result.directory.name


@pytest.mark.usefixtures("mine")
def test_its_views_are_counterfactual(random_interactions, random_features):
    features = random_features(17, 2)
    shuffled = {**features, "text": features["text"][::-1].copy()}
    one, two = (
        build_backbone("mine:EarlyFusion", random_interactions(11, 17), given, {"embedding_dim": 4}, seed=0, dtype=torch.float64)
        for given in (features, shuffled)
    )
    for view in ({"image"}, {"image", "text"}):
        tables = [model.embed([frozenset(view)])[frozenset(view)].items.detach().numpy() for model in (one, two)]
        assert np.allclose(*tables) == ("text" not in view)


@pytest.mark.usefixtures("mine")
def test_an_entry_point_gives_it_a_name(monkeypatch):
    monkeypatch.setattr(backbones, "_installed", lambda: {"early-fusion": "mine:EarlyFusion"})
    assert resolve({"backbone": "early-fusion"}).backbone == "early-fusion"
    assert backbone_class("early-fusion").__name__ == "EarlyFusion"


@pytest.mark.usefixtures("mine")
def test_its_options_are_checked(random_interactions, random_features, refuses):
    def build(**options):
        return build_backbone("mine:EarlyFusion", random_interactions(11, 17), random_features(17), options, seed=0)

    refuses(ConfigError, lambda: build(layer=1), "mine:EarlyFusion", "'layer'", "did you mean 'layers'")
    refuses(ConfigError, lambda: build(layers=0), "model.layers", 0)


class Masked(Backbone):
    """Asks for ``present`` by keyword only, and cannot do without it."""

    def __init__(self, train, features, *, present, size: int = 2):
        super().__init__(train, features, l2=0.0)
        self.seen = present
        self.users = nn.Parameter(torch.zeros(self.n_users, size))

    def reset_parameters(self):
        pass

    def forward(self, views):
        raise NotImplementedError


def test_masks_are_given_by_name(random_interactions, random_features, monkeypatch, refuses):
    module = ModuleType("masked")
    module.Masked = Masked
    monkeypatch.setitem(sys.modules, "masked", module)
    train, features = random_interactions(11, 17), random_features(17)
    lacking = np.arange(17) > 2

    def build(masks, **options):
        return build_backbone("masked:Masked", train, features, options, seed=0, masks=masks)

    assert build(None).seen == build({}).seen == {}
    (modality,) = build({"image": np.ones(17, dtype=bool), "text": lacking, "audio": lacking}).seen
    assert modality == "text"
    seen = build({"text": lacking}, size=3).seen["text"]
    assert seen.dtype == torch.bool
    assert seen.tolist() == lacking.tolist()
    message = refuses(ConfigError, lambda: build({}, present=3), "unknown option", "'present'", "size")
    assert "choices: size)" in message


def test_whether_a_module_is_here(tmp_path, monkeypatch, refuses):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importable("vbpr")
    assert not importable("no_such_module:Model")
    assert not importable("broken_module:Model")
    refuses(ConfigError, lambda: importable("vpbr"), "'vpbr'", "did you mean 'vbpr'")


def test_what_cannot_be_imported_is_named(refuses):
    refuses(ConfigError, lambda: backbone_class("no_such_module:Model"), "no_such_module", "every node")
    refuses(ConfigError, lambda: backbone_class("ckd_fed.backbones.vbpr:Nothing"), "Nothing")
    refuses(ConfigError, lambda: backbone_class("ckd_fed.config:Config"), "Config", "subclass")
    refuses(ConfigError, lambda: resolve({"backbone": "not a name:x"}), "not a name:x", "module:Class")
