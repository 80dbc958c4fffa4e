"""Flower's grid in one process: the real server and client code, messages handed across as serialised bytes."""

import itertools

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from ckd_fed.wire import digest
from clients.actions import handle


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
