"""Send requests to nodes and collect their replies, stamp and digest checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from ckd_fed.config import Config
from ckd_fed.errors import ReplyError
from ckd_fed.wire import Reply, Stamp, content_bytes, draw_nonce, read_reply, request

SHORTEST, LONGEST = 0.02, 1.0  # seconds between polls
_MARGIN = 2 * LONGEST  # by which a request outlives its time, so that a reply at the last moment is still found


@dataclass(frozen=True)
class Ask:
    """One request: on behalf of which role, with what, and how its answer is checked.

    Attributes:
        number: of the round.
        action: of the wire.
        role: who is asked; which node plays it is the roster's affair.
        arrays, values: the payload.
        check: makes what the caller wants of a reply, or raises :class:`ReplyError`; must change nothing.
    """

    number: int
    action: str
    role: str
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Reply], Any] = lambda reply: None


@dataclass
class Sent:
    """A request on its way.

    Attributes:
        ask: what was asked.
        stamp: with the nonce of this very message.
        node: whom.
        message_id: empty if Flower did not take the message.
        until: when its answer is given up, by the monotonic clock.
        n_bytes: of its arrays.
    """

    ask: Ask
    stamp: Stamp
    node: int
    message_id: str
    until: float
    n_bytes: int


class Exchange:
    """Requests and replies of one run.

    Replies are matched by the id of the message they answer (an error that Flower makes up for a lost node carries the SuperLink's
    id, not the node's) and bound to their request by stamp. A request that was given up is polled no more, so a late reply to it is
    never seen; should it arrive under another id, its nonce gives it away.

    Args:
        grid: Flower's view of the nodes.
        run: the run, as the nodes know it.
        config: sent with every request.
    """

    def __init__(self, grid: Grid, run: str, config: Config) -> None:
        self.grid = grid
        self.run = run
        self.config = config

    def send(self, asks: Sequence[tuple[Ask, int]], seconds: float) -> list[Sent]:
        """Send requests to nodes, without waiting; they have some seconds to answer."""
        messages, sent = [], []
        for ask, node in asks:
            stamp = Stamp(self.run, ask.action, ask.number, ask.role, draw_nonce())
            message = request(stamp, self.config, node, ask.arrays, seconds=seconds + _MARGIN, **ask.values)
            messages.append(message)
            sent.append(Sent(ask, stamp, node, "", time.monotonic() + seconds, content_bytes(message)))
        for item, message_id in zip(sent, self.grid.push_messages(messages), strict=True):
            item.message_id = message_id or ""
        return sent

    def tell(self, action: str, nodes: Sequence[int], seconds: float) -> dict[int, str]:
        """Ask nodes for something that is as well if it does not happen: node -> why it has not, for those where it has not."""
        sent = self.send([(Ask(0, action, f"node/{node}"), node) for node in nodes], seconds)
        failed = {item.node: f"no reply within {seconds:.0f} s" for item in sent}
        waiting = {item.message_id: item for item in sent if item.message_id}
        pause = SHORTEST
        while waiting and time.monotonic() < sent[0].until:
            for key, reply in self.poll(waiting).items():
                node = waiting.pop(key).node
                failed.pop(node)
                if isinstance(reply, ReplyError):
                    failed[node] = str(reply)
            if waiting:
                pause = min(LONGEST, pause * 1.5)
                time.sleep(pause)
        return failed

    def poll(self, waiting: Mapping[str, Sent]) -> dict[str, Reply | ReplyError]:
        """What has arrived by now: message id -> checked reply, or why it is not used."""
        arrived: dict[str, Reply | ReplyError] = {}
        for message in self.grid.pull_messages(list(waiting)):
            key = message.metadata.reply_to_message_id
            if key not in waiting:
                continue
            try:
                arrived[key] = read_reply(message, waiting[key].stamp)
            except ReplyError as error:
                arrived[key] = error
        return arrived
