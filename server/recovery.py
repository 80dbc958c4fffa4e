"""Requests that survive the loss of nodes: tried again when their node is back, and given up as configured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckd_fed.errors import FinalError, ReplyError
from ckd_fed.wire import Reply
from server.exchange import LONGEST, SHORTEST, Ask, Exchange, Sent
from server.roster import Roster

_LONGEST_PAUSE = 120.0


@dataclass
class Answer:
    """A checked reply: what the check made of it, its bytes, and the seconds that the node worked."""

    value: Any
    n_bytes: int
    busy: float


@dataclass
class Round:
    """What came of requests: (action, role) -> answer; the teachers that are lost; tries beyond the first; bytes sent."""

    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    sent_bytes: int = 0

    def value(self, action: str, role: str) -> Any:
        """What the check of a request made of its reply."""
        return self.answers[action, role].value

    @property
    def n_bytes(self) -> int:
        """Bytes sent and received."""
        return self.sent_bytes + sum(answer.n_bytes for answer in self.answers.values())

    @property
    def busy(self) -> float:
        """The longest time in seconds that a node worked: what the round would take without messaging."""
        return max((answer.busy for answer in self.answers.values()), default=0.0)


@dataclass
class _Task:
    """A request until it is answered or given up."""

    ask: Ask
    failures: int = 0
    reason: str = ""
    again_at: float = 0.0
    absent_since: float | None = None


class Recovery:
    """Sends requests to the nodes of their roles, and again when they fail.

    A request fails if Flower reports an error, the node refuses, its reply does not pass the checks, or none comes within
    ``federation.reply-timeout``. It is sent again up to ``federation.retry-limit`` times, after pauses that double, to the node that
    plays the role then; a role whose node is gone waits for it up to ``federation.node-timeout`` seconds. Beyond that, and where a node
    says that it would fail again, a student's loss ends the run; a teacher's is handled as ``federation.on-lost-teacher`` says.

    Args:
        exchange: with the nodes.
        roster: who plays which role.
        write: prints one line.
    """

    def __init__(self, exchange: Exchange, roster: Roster, write: Callable[[str], None]) -> None:
        self._exchange = exchange
        self._roster = roster
        self._write = write
        self._limits = exchange.config.federation

    def ask(self, asks: Sequence[Ask]) -> Round:
        """Ask for something and wait until every request is answered or its teacher given up.

        Raises:
            ReplyError: a request failed for good and the configuration says that this ends the run.
        """
        result = Round()
        idle = [_Task(ask) for ask in asks]
        waiting: dict[str, tuple[_Task, Sent]] = {}
        pause = SHORTEST
        while idle or waiting:
            idle, sent = self._send(idle, result)
            waiting.update(sent)
            arrived = self._exchange.poll({key: item for key, (_, item) in waiting.items()}) if waiting else {}
            for key, reply in arrived.items():
                task, item = waiting.pop(key)
                answer = self._checked(task.ask, item.node, reply)
                if isinstance(answer, ReplyError):
                    self._failed(task, answer, idle, result)
                else:
                    result.answers[task.ask.action, task.ask.role] = answer
            for key in [key for key, (_, item) in waiting.items() if time.monotonic() > item.until]:
                task, item = waiting.pop(key)
                late = f"no reply to {item.stamp} within {self._limits.reply_timeout:.0f} s (federation.reply-timeout)"
                self._failed(task, ReplyError(late), idle, result)
            pause = SHORTEST if arrived or sent else min(LONGEST, pause * 1.5)
            if idle or waiting:
                time.sleep(pause)
        return result

    def _send(self, idle: list[_Task], result: Round) -> tuple[list[_Task], dict[str, tuple[_Task, Sent]]]:
        """Send what is due to nodes that are there; returns what stays idle and what is on its way."""
        left, due = [], []
        for task in idle:
            if time.monotonic() < task.again_at:
                left.append(task)
                continue
            # A node that failed twice running makes room for another that could play its role.
            node = self._roster.locate(task.ask.role, avoid=task.failures > 1) if task.failures else self._roster.nodes[task.ask.role]
            if node is None:
                self._absent(task, left, result)
            else:
                task.absent_since = None
                due.append((task, node))
        sent: dict[str, tuple[_Task, Sent]] = {}
        items = self._exchange.send([(task.ask, node) for task, node in due], self._limits.reply_timeout) if due else []
        for (task, node), item in zip(due, items, strict=True):
            result.sent_bytes += item.n_bytes
            if item.message_id:
                sent[item.message_id] = (task, item)
            else:
                gone = f"Flower took no message for {task.ask.action} to {task.ask.role} (node {node}); it is gone"
                self._failed(task, ReplyError(gone), left, result)
        return left, sent

    def _failed(self, task: _Task, error: ReplyError, idle: list[_Task], result: Round) -> None:
        task.failures += 1
        task.reason = str(error)
        if task.failures > self._limits.retry_limit or isinstance(error, FinalError):
            self._give_up(task, error, idle, result)
            return
        seconds = min(_LONGEST_PAUSE, self._limits.retry_pause * 2 ** (task.failures - 1))
        task.again_at = time.monotonic() + seconds
        result.retries += 1
        idle.append(task)
        self._write(f"{error}; trying again in {seconds:.0f} s ({task.failures} of {self._limits.retry_limit}, federation.retry-limit)")

    def _absent(self, task: _Task, idle: list[_Task], result: Round) -> None:
        now = time.monotonic()
        if task.absent_since is None:
            task.absent_since = now
            self._write(f"{task.ask.role} has no node at the moment; waiting up to {self._limits.node_timeout:.0f} s (federation.node-timeout)")
        if now - task.absent_since > self._limits.node_timeout:
            away = ReplyError(f"{task.reason}; its node did not come back within {self._limits.node_timeout:.0f} s")
            self._give_up(task, away, idle, result)
            return
        task.again_at = now + min(LONGEST, self._limits.node_timeout)
        idle.append(task)

    def _give_up(self, task: _Task, error: ReplyError, idle: list[_Task], result: Round) -> None:
        role, policy = task.ask.role, self._limits.on_lost_teacher
        if role.startswith("teacher/") and policy == "drop":
            result.lost[role.removeprefix("teacher/")] = str(error)
            return
        if role.startswith("teacher/") and policy == "wait" and not isinstance(error, FinalError):
            self._write(f"{error}; waiting on for {role} (federation.on-lost-teacher=wait)")
            task.failures, task.absent_since = 1, None
            task.again_at = time.monotonic() + min(_LONGEST_PAUSE, self._limits.retry_pause * 2**self._limits.retry_limit)
            idle.append(task)
            return
        raise error

    def _checked(self, ask: Ask, node: int, reply: Reply | ReplyError) -> Answer | ReplyError:
        if isinstance(reply, ReplyError):
            return reply
        changed = self._roster.changed(node, ask.role, reply.holds)
        if changed:
            return ReplyError(f"{reply.stamp}: {changed}")
        try:
            return Answer(ask.check(reply), reply.n_bytes, reply.busy)
        except ReplyError as error:
            return error
