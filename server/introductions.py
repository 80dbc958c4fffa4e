"""Ask nodes who they are, without waiting for any of them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ckd_fed.errors import LostError, ReplyError
from ckd_fed.wire import NodeCard, Reply, read_card
from server.exchange import Ask, Exchange, Sent


class Introductions:
    """Requests for cards that are on their way.

    A node handles one message at a time: one that still trains for an earlier request answers when it is done, and holds up nobody else
    meanwhile.

    Args:
        exchange: with the nodes.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._waiting: dict[str, Sent] = {}

    @property
    def silent(self) -> list[int]:
        """Nodes that were asked and have not answered yet."""
        return sorted(item.node for item in self._waiting.values())

    def look(self, nodes: Iterable[int], seconds: float) -> dict[int, NodeCard | ReplyError]:
        """Ask those who have not been asked, and take the answers that have arrived.

        Args:
            nodes: connected ones whose card is wanted; requests to others are given up.
            seconds: that a node asked now has for its answer.

        Returns:
            node -> its card, or why there is none.
        """
        wanted, answers = set(nodes), dict[int, NodeCard | ReplyError]()
        self._waiting = {key: item for key, item in self._waiting.items() if item.node in wanted}
        new = sorted(wanted - set(self.silent))
        for item in self._exchange.send([(Ask(0, "enrol", f"node/{node}"), node) for node in new], seconds) if new else []:
            if item.message_id:
                self._waiting[item.message_id] = item
            else:
                answers[item.node] = LostError(f"Flower took no message for node {item.node}; it is gone")
        for key, reply in self._exchange.poll(self._waiting).items() if self._waiting else ():
            answers[self._waiting.pop(key).node] = _card(reply)
        for key in [key for key, item in self._waiting.items() if time.monotonic() > item.until]:
            item = self._waiting.pop(key)
            answers[item.node] = LostError(f"no reply to {item.stamp} in time")
        return answers


def _card(reply: Reply | ReplyError) -> NodeCard | ReplyError:
    if isinstance(reply, ReplyError):
        return reply
    try:
        return read_card(reply)
    except ReplyError as error:
        return error
