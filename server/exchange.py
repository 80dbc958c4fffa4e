"""Send requests to nodes and collect their checked replies."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from ckd_fed.config import Config
from ckd_fed.errors import ReplyError
from ckd_fed.wire import Reply, Stamp, content_bytes, read_reply, request

_SHORTEST, _LONGEST = 0.02, 1.0  # seconds between polls


@dataclass(frozen=True)
class Ask:
    """One request: to which node, on behalf of which role, with what."""

    node: int
    action: str
    role: str
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """Requests on their way: message id -> what was asked."""

    stamps: Mapping[str, Stamp]
    sent_bytes: int
    since: float


class Exchange:
    """Requests and replies of one run.

    Replies are matched by the id of the message they answer (an error that Flower makes up for a lost node carries the SuperLink's
    id, not the node's) and bound to their request by stamp.

    Args:
        grid: Flower's view of the nodes.
        run: name of the run.
        config: sent with every request.
    """

    def __init__(self, grid: Grid, run: str, config: Config) -> None:
        self.grid = grid
        self.run = run
        self.config = config
        self.seconds: dict[Stamp, float] = {}  # from sending a request to having its reply
        self._sent: dict[Stamp, float] = {}

    def send(self, number: int, asks: list[Ask]) -> Pending:
        """Send requests of one round without waiting."""
        messages = [request(Stamp(self.run, ask.action, number, ask.role), self.config, ask.node, ask.arrays, **ask.values) for ask in asks]
        sent = sum(content_bytes(message) for message in messages)
        ids = list(self.grid.push_messages(messages))
        stamps = {message_id: Stamp(self.run, ask.action, number, ask.role) for message_id, ask in zip(ids, asks, strict=True) if message_id}
        if len(stamps) != len(asks):
            lost = [f"{ask.action} to {ask.role}" for message_id, ask in zip(ids, asks, strict=True) if not message_id]
            raise ReplyError(f"Flower took no message for {', '.join(lost)}; the node is gone")
        self._sent.update(dict.fromkeys(stamps.values(), time.monotonic()))
        return Pending(stamps, sent, time.monotonic())

    def replies(self, pending: Pending, timeout: float) -> tuple[dict[Stamp, Reply], dict[Stamp, ReplyError]]:
        """Wait for replies.

        Returns:
            Checked replies and failures by stamp; a stamp in neither had no reply by the deadline.
        """
        good: dict[Stamp, Reply] = {}
        failed: dict[Stamp, ReplyError] = {}
        waiting = dict(pending.stamps)
        deadline, pause = time.monotonic() + timeout, _SHORTEST
        while waiting and time.monotonic() < deadline:
            arrived = [message for message in self.grid.pull_messages(list(waiting)) if message.metadata.reply_to_message_id in waiting]
            for message in arrived:
                stamp = waiting.pop(message.metadata.reply_to_message_id)
                self.seconds[stamp] = time.monotonic() - self._sent.get(stamp, pending.since)
                try:
                    good[stamp] = read_reply(message, stamp)
                except ReplyError as error:
                    failed[stamp] = error
            pause = _SHORTEST if arrived else min(_LONGEST, pause * 1.5)
            if waiting:
                time.sleep(pause)
        return good, failed

    def all_replies(self, *pendings: Pending) -> dict[tuple[str, str], Reply]:
        """Wait for every reply: (action, role) -> reply.

        Raises:
            ReplyError: a node failed, refused, answered something else or not in time; all reasons are named.
        """
        limit = self.config.federation.reply_timeout
        merged = Pending({key: stamp for pending in pendings for key, stamp in pending.stamps.items()}, 0, 0.0)
        good, failed = self.replies(merged, limit)
        missing = [stamp for stamp in merged.stamps.values() if stamp not in good and stamp not in failed]
        reasons = [str(error) for error in failed.values()]
        reasons += [f"no reply to {stamp} within {limit:.0f} s (federation.reply-timeout)" for stamp in missing]
        if reasons:
            raise ReplyError("; ".join(dict.fromkeys(reasons)))
        return {(stamp.action, stamp.role): answer for stamp, answer in good.items()}

    def seconds_by_role(self, replies: Mapping[tuple[str, str], Reply]) -> dict[str, float]:
        """``seconds/<action>/<role>`` of some replies: how long each node took to answer."""
        return {f"seconds/{action}/{role}": round(self.seconds.get(reply.stamp, 0.0), 3) for (action, role), reply in replies.items()}

    def ask(self, number: int, asks: list[Ask]) -> dict[tuple[str, str], Reply]:
        """Send requests and wait for every reply."""
        return self.all_replies(self.send(number, asks))
