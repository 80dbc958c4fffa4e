"""Processes that know nothing but which run they serve."""

import pytest
from flwr.supercore.task_identity import TaskIdentity

from clients import node as client_node


@pytest.fixture
def processes(monkeypatch):
    """Flower tells a process its run; whatever the mutation suite sets is put back afterwards."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    client_node._FITS.clear()
    yield
    client_node._FITS.clear()
