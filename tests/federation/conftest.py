"""A federation in one process; see tests/loopback.py."""

import pytest
from flwr.supercore.task_identity import TaskIdentity
from loopback import LoopbackGrid, simulated

from clients import node as client_node
from server.session import run_federation


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """Each test starts with processes that know nothing but which run they serve (Flower tells them)."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    client_node._FITS.clear()
    yield
    client_node._FITS.clear()


@pytest.fixture
def keep(monkeypatch):
    """Nodes that keep their workspaces when a run is finished, so that one can look at them."""
    monkeypatch.setattr(client_node.Node, "forget", lambda self, run: None)


@pytest.fixture
def federate(tmp_path):
    """Run a federation to its end over a loopback grid and return (result, grid, federation)."""

    def run(overrides, nodes=None, tamper=None, run="fed", write=lambda line: None):
        given = {"tracking.wandb": "off", "tracking.report": False, "home": str(tmp_path), "name": run}  # the report has tests of its own
        given.update({"federation.enrol-timeout": 1, "federation.retry-pause": 0.01})
        overrides = {"name": ""} | overrides if "resume" in overrides else overrides
        grid = nodes if isinstance(nodes, LoopbackGrid) else LoopbackGrid(simulated(2) if nodes is None else nodes, tamper)
        session = run_federation(grid, {**given, **overrides}, 1, write)
        return session.result, grid, session.federation

    run.grid = lambda: LoopbackGrid(simulated(2))
    return run
