"""A request as a node reads it."""

import pytest
from flwr.common.serde import message_from_proto, message_to_proto

from ckd_fed import config as module
from ckd_fed.config import resolve
from ckd_fed.wire import Stamp, draw_nonce, read_request, request


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Go to a machine whose ``configs/`` holds some files (name -> text) and no others."""

    def go(name, **files):
        folder = tmp_path / name
        for kind, text in files.items():
            (folder / kind).mkdir(parents=True)
            (folder / kind / "mine.yaml" if kind == "recipes" else folder / kind / "vbpr.yaml").write_text(text)
        monkeypatch.setattr(module, "configs_directory", lambda: folder)

    return go


def received(config):
    """The configuration on the node to which it was sent."""
    message = request(Stamp("run", "enrol", 0, "node/1", draw_nonce()), config, 1)
    return lambda: read_request(message_from_proto(message_to_proto(message))).config


def test_a_recipe_that_only_the_server_has_counts_on_its_nodes(machine):
    machine("server", recipes="distillation: {rho: 2.0}")
    config = resolve({"recipe": "mine"})
    read = received(config)
    machine("node")
    assert read() == config
    assert read().distillation.rho == 2.0


def test_a_key_that_only_the_nodes_files_have_counts_for_nothing(machine):
    machine("server", backbones="model: {l2: 0.5}")
    config = resolve()
    read = received(config)
    machine("node", backbones="model: {embedding-dim: 8}")
    assert read() == config
    assert dict(read().model) == {"l2": 0.5}
