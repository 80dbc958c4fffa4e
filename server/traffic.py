"""What a run sent, against what else it could have sent, and how long it waited for messages."""

from __future__ import annotations

from ckd_fed.config import Config
from ckd_fed.tracking.console import size
from ckd_fed.wire import margin_dtype
from server.checkpoints import RunState
from server.enrolment import Plan
from server.stretch import sheet_bytes


def traffic_lines(state: RunState, plan: Plan, config: Config) -> list[str]:
    """Two lines for the end of a run: the share of messaging, and bytes an epoch and modality beside the alternatives.

    The alternatives are what a teacher would have to send instead, in the margins' dtype: its scores of all users and items, or its
    embedding tables. Those would be sent once, and give away the whole teacher.
    """
    totals = state.totals
    share = totals.messaging / totals.seconds if totals.seconds else 0.0
    lines = [f"messaging: {totals.messaging:.1f} s of the rounds' {totals.seconds:.1f} s ({share:.0%}), {size(totals.n_bytes)} in all"]
    if totals.retries:
        lines[0] += f", {totals.retries} requests sent again"
    width = max((learner.width for learner in state.learners.values()), default=0)
    if width and totals.margin_bytes:
        card, item = plan.card, margin_dtype(config).itemsize
        sheet = sheet_bytes(config, card.n_train)
        dense, tables = card.n_users * card.n_items * item, (card.n_users + card.n_items) * width * item
        lines.append(
            f"margins: {size(sheet)} an epoch and modality; all scores would be {size(dense)}, a teacher's embedding tables {size(tables)} "
            f"(width {width})"
        )
    return lines
