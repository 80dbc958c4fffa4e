"""A federation in one process: the real server and client code over a grid that hands messages across as serialised bytes."""

import itertools

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from ckd_fed.wire import digest
from clients import node as client_node
from clients.actions import handle
from server.session import run_federation


class LoopbackGrid:
    """Stands in for Flower's grid: messages and replies pass through Flower's own serialisation, so that nothing is shared.

    ``tamper`` may change or replace a reply (return None to lose it); ``seen`` keeps (request, reply) of every exchange.
    """

    def __init__(self, node_configs, tamper=None):
        self.node_configs = dict(enumerate(node_configs, start=1001))
        self.tamper = tamper
        self.seen = []
        self._waiting = {}
        self._ids = itertools.count(1)

    def get_node_ids(self):
        return list(self.node_configs)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message_id = f"message-{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message_from_proto(message_to_proto(message))
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids):
        replies = []
        for message_id in message_ids:
            if message_id not in self._waiting:
                continue
            message = self._waiting.pop(message_id)
            node = message.metadata.dst_node_id
            context = Context(1, node, self.node_configs[node], RecordDict(), {})
            try:
                reply = handle(message, context)
            except Exception as error:  # as Flower does with a client that raises
                reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
            reply = message_from_proto(message_to_proto(reply))
            if self.tamper:
                reply = self.tamper(message, reply)
                seal(reply)
            self.seen.append((message, reply))
            if reply is not None:
                replies.append(reply)
        return replies


def seal(reply):
    """Give a changed reply a digest that fits: whoever lies can compute one."""
    if reply is not None and reply.has_content() and isinstance(reply.content.get("reply"), ConfigRecord) and "digest" in reply.content["reply"]:
        reply.content["reply"]["digest"] = digest(reply.content, "reply")


def simulated(n):
    """Node-configs of n simulated nodes."""
    return [{"partition-id": index, "num-partitions": n} for index in range(n)]


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """Each test starts with processes that know nothing but which run they serve (Flower tells them)."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    client_node._FITS.clear()
    yield
    client_node._FITS.clear()


@pytest.fixture
def federate(tmp_path):
    """Run a federation to its end over a loopback grid and return (result, grid, federation)."""

    def run(overrides, nodes=None, tamper=None, run="fed", write=lambda line: None):
        given = {"tracking.wandb": "off", "home": str(tmp_path), "federation.enrol-timeout": 1, "federation.retry-pause": 0.01, "name": run}
        overrides = {"name": ""} | overrides if "resume" in overrides else overrides
        grid = nodes if isinstance(nodes, LoopbackGrid) else LoopbackGrid(simulated(2) if nodes is None else nodes, tamper)
        session = run_federation(grid, {**given, **overrides}, 1, write)
        return session.result, grid, session.federation

    run.grid = lambda: LoopbackGrid(simulated(2))
    return run
