"""Which node plays which role, as nodes die, come back under other ids, and are replaced by spares."""

from __future__ import annotations

from collections.abc import Callable

from ckd_fed.errors import ReplyError
from ckd_fed.wire import Holdings, NodeCard
from server.enrolment import Plan, different_students, features_of, full_name, held, sizes
from server.exchange import Exchange
from server.introductions import Introductions

_ENROL_SECONDS = 90.0  # a newcomer's time to introduce itself; in a deployment a message takes 6 to 16 s
_ENROL_TRIES = 3


class Roster:
    """The node of every role.

    A role is found by what it is (teacher of a modality, student), never by node id: a node that died and came back under another id
    is the same teacher. Where nobody else is left, a hot spare takes over. A node may restart with other files or code: one that was seen to be
    gone, or whose reply says so, is asked anew who it is before it is asked for anything else.

    Args:
        exchange: with the nodes.
        plan: from enrolment.
        write: prints one line.
    """

    def __init__(self, exchange: Exchange, plan: Plan, write: Callable[[str], None]) -> None:
        self._exchange = exchange
        self._write = write
        self.cards: dict[int, NodeCard] = dict(plan.cards)  # of all nodes that ever fitted this run
        self._known = set(plan.cards)  # those whose card holds still, as far as is known
        self.nodes: dict[str, int] = {f"teacher/{m}": node for m, node in plan.teachers.items()}
        self.nodes |= {f"student/{worker}": node for worker, node in enumerate(plan.students)}
        self.nodes["plain"] = plan.students[0]
        self._own = plan.card
        self._teachers = {m: plan.cards[node].features for m, node in plan.teachers.items()}
        self._introductions = Introductions(exchange)
        self._tries: dict[int, int] = {}

    def locate(self, role: str, *, avoid: bool = False) -> int | None:
        """The connected node that plays a role now; None if there is none at the moment.

        Args:
            role: ``teacher/<m>``, ``student/<w>`` or ``plain``.
            avoid: the present node failed repeatedly, so another one is taken if there is one.
        """
        connected = set(self._exchange.grid.get_node_ids())
        self._known &= connected
        self._tries = {node: n for node, n in self._tries.items() if node in connected}  # whoever comes back begins anew
        self._meet(connected - self._known)
        present = self.nodes[role]
        usable = present in self._known and (not self.cards[present].role or self._can_play(present, role))
        if usable and not avoid:
            return present
        others = [node for node in self._known if node != present and self._can_play(node, role)]
        if others:
            chosen = max(others, key=lambda node: (held(self.cards[node]).get(role, -1), -node))
            self._write(f"{role}: {full_name(chosen, self.cards[chosen])} takes over from {full_name(present, self.cards[present])}")
            for name in ("student/0", "plain") if role in ("student/0", "plain") else (role,):
                if self.nodes[name] == present:
                    self.nodes[name] = chosen
            return chosen
        return present if usable else None

    def changed(self, node: int, role: str, holds: Holdings | None) -> str:
        """Why what a node worked with is not what it enrolled with; empty if it is. If not, its card counts no more."""
        card = self.cards[node]
        features = features_of(card)
        if role.startswith("teacher/"):
            features = {m: said for m, said in features.items() if m == role.removeprefix("teacher/")}
        if holds == Holdings(card.code, card.split, features):
            return ""
        self._known.discard(node)
        if holds is None:
            return "it does not say what it was made with"
        wrong = [what for what, now, before in (("code", holds.code, card.code), ("split", holds.split, card.split)) if now != before]
        wrong += [f"{m} features" for m in sorted({*features, *holds.features}) if holds.features.get(m) != features.get(m)]
        return f"it was made with another {' and other '.join(wrong)} than {full_name(node, card)} enrolled with; restore what it had"

    def _can_play(self, node: int, role: str) -> bool:
        card = self.cards[node]
        if card.role != ("teacher" if role.startswith("teacher/") else "student") or node in self._used(role):
            return False
        return card.role == "student" or card.modality == role.removeprefix("teacher/")

    def _used(self, role: str) -> set[int]:
        """Nodes that play something else (the plain student and worker 0 are one node's)."""
        together = ("student/0", "plain") if role in ("student/0", "plain") else (role,)
        return {node for name, node in self.nodes.items() if name not in together}

    def _meet(self, newcomers: set[int]) -> None:
        """Ask newcomers who they are, and take in who has answered; one that cannot take part is said and left alone until it has been away."""
        asked = {node for node in newcomers if self._tries.get(node, 0) < _ENROL_TRIES}
        for node, card in self._introductions.look(asked, _ENROL_SECONDS).items():
            if isinstance(card, ReplyError):
                self._tries[node] = self._tries.get(node, 0) + 1
                self._write(f"node {node} has come and cannot take part: {card}")
                continue
            wrong = self._disagreement(card)
            if wrong:
                self._tries[node] = _ENROL_TRIES
            else:
                self.cards[node] = card
                self._known.add(node)
            self._write(f"{full_name(node, card)} has come{f' and cannot take part: {wrong}' if wrong else ''}")

    def _disagreement(self, card: NodeCard) -> str:
        """Why a newcomer does not belong to this run; empty if it does."""
        if card.code != self._own.code:
            return f"it runs other code, {card.code} instead of {self._own.code}"
        if card.split != self._own.split:
            return f"it holds another split, {card.split[:12]} instead of {self._own.split[:12]}"
        if sizes(card) != sizes(self._own):
            return "it states other sizes of the same split"
        if bool(card.role) != bool(self._own.role):
            return "it takes any role and the others one each, or the other way round"
        if card.role != "teacher" and (unlike := different_students(self._own, card)):
            return f"the run's students have different {unlike}"
        if card.role == "teacher" and self._teachers.get(card.modality, card.features) != card.features:
            return f"its {card.modality} features differ from those of the run's teacher"
        return ""
