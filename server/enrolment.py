"""Enrolment: which nodes are there, what they hold, and who plays which role."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckd_fed.config import Config
from ckd_fed.data.dataset import check_modality
from ckd_fed.data.missing import check_hidden
from ckd_fed.errors import DataError, EnrolmentError, LostError, ReplyError, unknown
from ckd_fed.wire import NodeCard, read_json
from server.checkpoints import RunState
from server.exchange import LONGEST, SHORTEST, Exchange
from server.introductions import Introductions

_GRACE = 20.0  # seconds for the answers of further nodes, once all roles are taken: a message takes 6 to 16 s in a deployment


@dataclass(frozen=True)
class Plan:
    """Who plays which role.

    Attributes:
        teachers: modality -> node id; empty without distillation.
        students: node id of each student worker, the first being worker 0.
        spare: nodes without a role; a second teacher of a modality is its hot spare.
        cards: node id -> what it said of itself.
        modalities: of the student, in order.
        lost: modality -> why its teacher, which the run that is gone on with had, is given up.
    """

    teachers: Mapping[str, int]
    students: tuple[int, ...]
    spare: tuple[int, ...]
    cards: Mapping[int, NodeCard]
    modalities: tuple[str, ...]
    lost: Mapping[str, str] = field(default_factory=dict)

    @property
    def card(self) -> NodeCard:
        """The card of the first student worker, whose split is everybody's."""
        return self.cards[self.students[0]]

    @property
    def whole(self) -> bool:
        """Whether every item has every modality, as the student holds them."""
        return not any(mask_of(self.card, m) for m in self.modalities)

    def features(self) -> dict[str, str]:
        """``student/<m>``, ``teacher/<m>`` -> fingerprint of the features (and mask) of m there."""
        held = {f"student/{m}": features_of(self.card).get(m, "") for m in self.modalities}
        return held | {f"teacher/{m}": features_of(self.cards[node]).get(m, "") for m, node in self.teachers.items()}

    def facts(self) -> dict[str, dict[str, str]]:
        """Role -> which node plays it, on which host and device: what a run's record keeps."""
        roles = {**{f"teacher/{m}": node for m, node in self.teachers.items()}, **{f"student/{w}": node for w, node in enumerate(self.students)}}
        return {role: {"node": str(node), "host": self.cards[node].host, "device": self.cards[node].device} for role, node in roles.items()}

    def describe(self) -> list[str]:
        """A line for each role: role, node, host, device."""
        roles = [(f"teacher {m}", node) for m, node in self.teachers.items()]
        roles += [(f"student worker {index}" if len(self.students) > 1 else "student", node) for index, node in enumerate(self.students)]
        roles += [(f"spare {self.cards[node].role} {self.cards[node].modality}".rstrip(), node) for node in self.spare]
        return [f"  {role:<18} node {node} on {self.cards[node].host} ({self.cards[node].device})" for role, node in roles]


def enrol(exchange: Exchange, write: Callable[[str], None], state: RunState | None = None) -> Plan:
    """Wait until the nodes needed are there and agree, up to ``federation.enrol-timeout``.

    Nobody is waited for longer than needed: once all roles are taken, nodes that are silent have a little time left, because one of them
    may have played a role before. In a run that is gone on with they have it all; and where a role is missing while a node is silent,
    which may still train for a request from before, they have up to ``federation.node-timeout``. A teacher that has not come by then is
    given up under ``federation.on-lost-teacher=drop``.

    Args:
        exchange: with the nodes.
        write: prints one line.
        state: of the run that is gone on with; None for a new one.

    Raises:
        EnrolmentError: what is missing at the deadline; at once what cannot be mended by waiting (different splits or code, a
            modality that is unknown, or has two teachers with different features, students that differ, data that a node cannot use).
        ConfigError: at once, a modality that is to be hidden and that nobody has.
    """
    limits, started = exchange.config.federation, time.monotonic()
    deadline = settled = started + limits.enrol_timeout
    last = max(deadline, started + limits.node_timeout) if state else deadline
    introductions = Introductions(exchange)
    cards: dict[int, NodeCard] = {}
    said, pause = "", SHORTEST
    while True:
        connected = set(exchange.grid.get_node_ids())
        cards = {node: card for node, card in cards.items() if node in connected}  # who has gone meanwhile may come back
        answers = introductions.look(connected - set(cards), last - time.monotonic() + 2 * LONGEST)  # no answer is given up before the end
        new = _cards(answers, write)
        cards |= new
        plan, missing = None, f"no node has {'answered' if connected else 'connected'}"
        if cards:
            plan, missing = assign(exchange.config, cards, tuple(state.dropped) if state else ())
        now, silent = time.monotonic(), introductions.silent
        busy = f"connected, no answer yet (perhaps still busy with an earlier request): {', '.join(f'node {node}' for node in silent)}"
        if plan:
            settled = settled if state else min(settled, now + _GRACE)
            if not silent or now >= settled:
                if silent:
                    write(f"going on without some nodes; {busy}")
                return plan
            line = f"all roles are taken; {busy}"
        elif now >= (last if silent else deadline):
            there = ", ".join(full_name(node, card) for node, card in cards.items()) or "none"
            setting = "node-timeout" if now >= last > deadline else "enrol-timeout"
            reason = f"after {now - started:.0f} s (federation.{setting}) {missing}; nodes there: {there}{f'; {busy}' if silent else ''}"
            without = _without_lost(exchange.config, cards, state, reason) if state and cards else None
            if without and limits.on_lost_teacher == "drop":
                return without
            hint = '; federation.on-lost-teacher="drop" would go on without it' if without else ""
            raise EnrolmentError(reason + hint)
        elif now >= deadline:
            line = f"waiting up to {last - started:.0f} s (federation.node-timeout): {missing}; {busy}"
        else:
            line = f"waiting for nodes: {missing}" if cards else said
        if line != said:
            write(line)
            said = line
        pause = SHORTEST if new else LONGEST if answers else min(LONGEST, pause * 1.5)  # one that is lost is asked again, but not at once
        time.sleep(pause)


def _without_lost(config: Config, cards: Mapping[int, NodeCard], state: RunState, reason: str) -> Plan | None:
    """A plan without the teachers that a run had and that have not come; None if that is no help, or none would be left."""
    there = {card.modality for card in cards.values() if card.role == "teacher"}
    lost = {m: reason for m in state.modalities if m not in there and m not in state.dropped}
    plan, _ = assign(config, cards, [*state.dropped, *lost])
    return replace(plan, lost=lost) if plan and set(plan.teachers) - set(state.dropped) else None


def _cards(answers: Mapping[int, NodeCard | ReplyError], write: Callable[[str], None]) -> dict[int, NodeCard]:
    """The cards among answers; a node that was lost while it was asked is left out, one that says why it cannot take part ends the run."""
    failed = {node: answer for node, answer in answers.items() if isinstance(answer, ReplyError)}
    for node in [node for node, error in failed.items() if isinstance(error, LostError)]:
        write(f"node {node} was lost at enrolment: {failed.pop(node)}")
    reasons = list(dict.fromkeys(str(error).partition(": ")[2] if len(failed) > 1 else str(error) for error in failed.values()))
    if reasons:
        raise EnrolmentError("; ".join(reasons))
    return {node: card for node, card in answers.items() if isinstance(card, NodeCard)}


def assign(config: Config, cards: Mapping[int, NodeCard], dropped: Sequence[str] = ()) -> tuple[Plan | None, str]:
    """Give roles to the nodes there.

    Real nodes have theirs from their node-config; as many students as ``federation.student-workers`` are waited for. Simulated nodes are
    all alike: teachers, then students are dealt to them in the order of their partitions, several roles to a node where there are fewer
    nodes; those beyond are spare.

    Returns:
        A plan and "", or None and what is still missing.

    Raises:
        EnrolmentError, ConfigError: what waiting cannot mend.
    """
    # Whatever is wrong with a teacher that was given up, the run goes on without it; its node stays spare.
    needed = {node: card for node, card in cards.items() if not (card.role == "teacher" and card.modality in dropped)}
    _agree(needed)
    simulated = {node: card for node, card in cards.items() if not card.role}
    if simulated:
        own = {node: card for node, card in cards.items() if card.role}
        if own:
            any_role, one_role = (full_name(*next(iter(kind.items()))) for kind in (simulated, own))
            raise EnrolmentError(f"{any_role} takes any role, {one_role} has one of its own; stop one of them")
        return _deal(config, simulated)

    teachers: dict[str, int] = {}
    for node, card in needed.items():
        if card.role == "teacher":
            other = teachers.setdefault(card.modality, node)
            if cards[other].features != card.features:
                raise EnrolmentError(
                    f"modality {card.modality!r} has two teachers with different features: {full_name(other, cards[other])} and "
                    f"{full_name(node, card)}; a hot spare needs the same {card.modality}_feat.npy, so give it that or stop one of them"
                )
            role = f"teacher/{card.modality}"
            if held(card).get(role, 0) > held(cards[other]).get(role, 0):
                teachers[card.modality] = node  # it is where the run is; the other is the hot spare
    students = _in_order([node for node, card in cards.items() if card.role == "student"], cards)
    if not students:
        return None, 'a student node is missing (role="student")'
    modalities = _modalities(config, cards[students[0]])
    for modality, node in teachers.items():
        if modality not in modalities:
            raise EnrolmentError(f"{full_name(node, cards[node])} enrolled for an {unknown('modality', modality, modalities)}")
        if mask_of(cards[node], modality) != mask_of(cards[students[0]], modality):
            raise EnrolmentError(
                f"{full_name(node, cards[node])} and {full_name(students[0], cards[students[0]])} differ in which items have {modality}; a teacher "
                f"is asked about those only, so give both the same {modality}_mask.npy (or none, if all items have it)"
            )
    for node in students[1:]:
        unlike = different_students(cards[students[0]], cards[node])
        if unlike:
            raise EnrolmentError(
                f"two student nodes have different {unlike}: {full_name(students[0], cards[students[0]])} and {full_name(node, cards[node])}; "
                "they are averaged or stand in for one another, so give both the same files (or set data.modalities)"
            )
    if config.distillation.enabled:
        absent = [m for m in modalities if m not in teachers and m not in dropped]
        if absent:
            return None, f"the teacher of {' and of '.join(absent)} is missing"
    else:
        teachers = {}
    wanted = min(config.federation.student_workers, _steps(config, cards[students[0]]))
    if len(students) < wanted:
        return None, f"{wanted - len(students)} of {wanted} student nodes (federation.student-workers) are missing"
    workers = students[:wanted]
    used = {*workers, *teachers.values()}
    return Plan(
        {m: teachers[m] for m in modalities if m in teachers}, tuple(workers), tuple(n for n in cards if n not in used), cards, modalities
    ), ""


def held(card: NodeCard) -> dict[str, int]:
    """Role -> epochs trained, of this run's roles in a node's workspace."""
    try:
        found = read_json(card.held)
        return {str(role): int(epoch) for role, epoch in found.items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return {}


def _in_order(students: list[int], cards: Mapping[int, NodeCard]) -> list[int]:
    """Student nodes as workers 0, 1, …: in a run that is resumed, those that were one before as the same again."""
    order: list[int] = []
    free = list(students)
    for worker in range(len(students)):
        known = {node: held(cards[node]) for node in free}
        # One that has been another worker is the last choice: it may be needed as that.
        best = max(free, key=lambda node: (known[node].get(f"student/{worker}", -1), -len([r for r in known[node] if r.startswith("student/")])))
        order.append(best)
        free.remove(best)
    return order


def _deal(config: Config, cards: Mapping[int, NodeCard]) -> tuple[Plan | None, str]:
    expected = max(card.partitions for card in cards.values())
    if len(cards) < expected:
        return None, f"{expected - len(cards)} of {expected} simulated nodes are missing"
    nodes = sorted(cards, key=lambda node: cards[node].partition)
    modalities = _modalities(config, cards[nodes[0]])
    roles = list(modalities) if config.distillation.enabled else []
    teachers = {m: nodes[index % len(nodes)] for index, m in enumerate(roles)}
    wanted = min(config.federation.student_workers, _steps(config, cards[nodes[0]]))
    workers = [nodes[(len(roles) + worker) % len(nodes)] for worker in range(wanted)]
    return Plan(teachers, tuple(workers), tuple(nodes[len(roles) + wanted :]), cards, modalities), ""


def _modalities(config: Config, card: NodeCard) -> tuple[str, ...]:
    """The modalities of a run: those configured, or all that a student has.

    Raises:
        EnrolmentError: one whose name cannot be used.
        ConfigError: one that is to be hidden is not among them.
    """
    for modality in features_of(card):
        try:
            check_modality(modality)
        except DataError as error:
            raise EnrolmentError(f"{error} (on every node)") from None
    modalities = config.modalities or tuple(card.modalities.split(","))
    check_hidden(config.data.hidden_shares, modalities)
    return modalities


def _steps(config: Config, card: NodeCard) -> int:
    """Steps of an epoch: more student workers than that would have nothing to do."""
    return card.n_train // config.training.batch_size + 1


def _agree(cards: Mapping[int, NodeCard]) -> None:
    """All nodes on the same code and the same split, data and stand-in not mixed."""
    if not cards:
        return
    (first, card), *others = cards.items()
    for node, other in others:
        if other.code != card.code:
            raise EnrolmentError(
                f"two nodes run different code: {full_name(first, card)} {card.code}, {full_name(node, other)} {other.code}; "
                "install the same version on both"
            )
        if other.split != card.split:
            raise EnrolmentError(
                f"two nodes hold different splits: {full_name(first, card)} {card.split[:12]} ({card.dataset}), "
                f"{full_name(node, other)} {other.split[:12]} ({other.dataset}); give both the same train.json, val.json and test.json"
            )
        if sizes(other) != sizes(card):
            raise EnrolmentError(
                f"two nodes state different sizes of the same split: {full_name(first, card)} and {full_name(node, other)}; stop one of them"
            )


def sizes(card: NodeCard) -> tuple[int, ...]:
    """Of a node's split, all of which its fingerprint decides."""
    return card.n_users, card.n_items, card.n_train, card.n_val_users, card.n_test_users


def features_of(card: NodeCard) -> dict[str, str]:
    """Modality -> fingerprint of its features and mask, as the node holds them."""
    return dict(json.loads(card.features))


def mask_of(card: NodeCard, modality: str) -> str:
    """Fingerprint of which items have a modality, as the node holds it; empty if all have it."""
    return features_of(card).get(modality, "").partition("+")[2]


def different_features(plan: Plan) -> list[str]:
    """Modalities whose teacher holds other features than the student: allowed (a teacher may have better ones), but worth saying."""
    student = features_of(plan.card)
    return [m for m, node in plan.teachers.items() if features_of(plan.cards[node]).get(m) != student.get(m)]


def different_students(card: NodeCard, other: NodeCard) -> str:
    """In what two students differ, modalities, features or masks; empty if in nothing."""
    if set(card.modalities.split(",")) != set(other.modalities.split(",")):
        return f"modalities ({card.modalities} and {other.modalities})"
    first, second = features_of(card), features_of(other)
    for m in (m for m in first if first[m] != second.get(m)):
        return f"masks of {m}" if mask_of(card, m) != mask_of(other, m) else f"features of {m}"
    return ""


def full_name(node: int, card: NodeCard) -> str:
    """A node for people: role, id and host."""
    role = f"{card.role} {card.modality}".strip() or f"simulated node {card.partition}"
    return f"{role} (node {node} on {card.host})"
