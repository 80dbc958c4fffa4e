"""The ClientApp of every node: ``clients.app:app``. Roles are told apart by the messages, so all nodes run the same app."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ckd_fed.wire import QUERY_ACTIONS, TRAIN_ACTIONS
from clients.actions import handle

app = ClientApp()


def _answer(message: Message, context: Context) -> Message:
    return handle(message, context)


for _action in TRAIN_ACTIONS:
    app.train(_action)(_answer)
for _action in QUERY_ACTIONS:
    app.query(_action)(_answer)
