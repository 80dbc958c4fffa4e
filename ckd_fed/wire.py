"""What goes over the wire between server and nodes: one typed, validated form for each request and reply.

Both sides use this module and nothing else to make and read messages. A request and its reply carry a :class:`Stamp` and a digest of
their contents; a reply whose digest, stamp, names, shapes, dtypes or values are not exactly what was asked for is refused before
anything uses it.

=========  ==============================  ===============================================  ============================================
action     asked of                        request                                          reply
=========  ==============================  ===============================================  ============================================
enrol      every node                      configuration                                    :class:`NodeCard`
fit        teacher m, plain student        epochs of this round                             rows of validations, whether it has converged
test       teacher m, plain student        epoch of its best                                test metrics of its best, by user and group
score      teacher m                       the same, epochs of a stretch, number of workers a sheet of margins per worker, triples' hash
distil     a lone student                  weights, early stopping, sheets with hashes      weights, best weights, rows of validations
distil     one of several student workers  weights, sheets of margins with their hashes     weights, means of the stretch
evaluate   student worker                  weights, part of the split, share of the users   sums of metrics; of a test by user and group
forget     every node, of a finished run   configuration                                    nothing
=========  ==============================  ===============================================  ============================================

Features, interactions and a teacher's parameters appear in none of them. Every reply of a role says by fingerprints what it was made with
(:class:`Holdings`), because a node may have been given other files or code since it enrolled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ckd_fed.config import Config, is_folder_name, restore
from ckd_fed.distillation.margins import DTYPES
from ckd_fed.errors import FinalError, LostError, ReplyError

PROTOCOL = 6
_RAISED = 2  # Flower's code for an app that raised; its other codes tell of nodes and processes that are gone
_KINDS = "loss|val|only|calibrated|warm|cold|readout|effect|effect_share|weight|specific|generic|asked|sum"
_METRIC = re.compile(rf"(?:(?:{_KINDS})(?:/[\w@.\- ]+)+|\w+@\d+|epoch|gain|seconds|done)")
_LARGEST = 1 << 48  # users, items and interactions that are believed of a split
# Longest texts of a card by name. All but the JSON are shown to people.
_TEXTS = {"role": 32, "modality": 64, "code": 64, "split": 64, "dataset": 1000, "device": 64, "host": 255, "modalities": 10_000}
TRAIN_ACTIONS = ("fit", "distil")
QUERY_ACTIONS = ("enrol", "test", "score", "evaluate", "forget")


@dataclass(frozen=True)
class Stamp:
    """Binds a message to its purpose; a reply repeats the stamp of its request.

    Attributes:
        run: name of the run.
        action: see the module's table.
        round: the run's round counter.
        role: ``teacher/<m>``, ``plain``, ``student/<w>``, or ``node/<id>`` where a node is asked in no role.
        nonce: drawn anew for every request, so that an answer to an earlier request for the same thing is not taken for this one's.
    """

    run: str
    action: str
    round: int
    role: str
    nonce: str

    def __str__(self) -> str:
        return f"{self.action} of round {self.round} from {self.role}"


@dataclass(frozen=True)
class NodeCard:
    """What a node says of itself at enrolment.

    Attributes:
        role, modality: from its node-config; empty on a simulated node.
        partition: its place among the simulated nodes; -1 on a real node.
        partitions: number of simulated nodes; 0 on a real node.
        code: version and source hash of the installed packages.
        split: fingerprint of its split.
        n_users, n_items, n_train: of its split.
        n_val_users, n_test_users: how many users have an interaction to validate and to test with.
        modalities: whose feature files it has, comma-separated.
        features: JSON, modality -> fingerprint of its features.
        dataset: description for people.
        standin: whether its data are a stand-in.
        counterfactual: whether the backbone's scores depend on features, so that views differ and effects mean something.
        device: where it would train.
        host: for people.
        held: JSON, role -> epochs trained, of the run's roles that this node has in its workspace.
    """

    role: str
    modality: str
    partition: int
    partitions: int
    code: str
    split: str
    n_users: int
    n_items: int
    n_train: int
    n_val_users: int
    n_test_users: int
    modalities: str
    features: str
    dataset: str
    standin: bool
    counterfactual: bool
    device: str
    host: str
    held: str


@dataclass(frozen=True)
class Holdings:
    """What decides the outcome of a node's work.

    Attributes:
        code: version and source hash of the installed packages.
        split: fingerprint of its split.
        features: modality -> fingerprint of the features (and mask) that its role opens.
    """

    code: str
    split: str
    features: Mapping[str, str]


def draw_nonce() -> str:
    """128 random bits."""
    return secrets.token_hex(16)


def request(
    stamp: Stamp, config: Config, node: int, arrays: Mapping[str, np.ndarray] | None = None, *, seconds: float = 3600.0, **values: Any
) -> Message:
    """A message to a node.

    Args:
        stamp: what for.
        config: the run's configuration, complete: a node needs no other.
        node: id of the node.
        arrays: payload.
        seconds: after which neither Flower nor the node does anything with it.
        values: further scalars or lists.
    """
    content = RecordDict({"request": ConfigRecord({"protocol": PROTOCOL, **asdict(stamp), "config": json.dumps(config.flat()), **values})})
    if arrays:
        content["arrays"] = _pack(arrays)
    seal(content, "request")
    kind = "train" if stamp.action in TRAIN_ACTIONS else "query"
    return Message(content, dst_node_id=node, message_type=f"{kind}.{stamp.action}", ttl=seconds)


@dataclass(frozen=True)
class Request:
    """A request as the node reads it."""

    stamp: Stamp
    config: Config
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_request(message: Message) -> Request:
    """Read a request on a node.

    Raises:
        ReplyError: another protocol version, a request that lacks a part, a run or role that would lead out of the node's folders, or one that
            has been given up by now.
        ConfigError: a configuration this node does not understand.
    """
    try:
        values: dict[str, Any] = dict(message.content["request"])  # type: ignore[call-overload]
        protocol = values.pop("protocol")
        if protocol != PROTOCOL:
            raise ReplyError(f"the server speaks wire protocol {protocol}, this node {PROTOCOL}; install the same version of ckd_fed on both")
        if values.pop("digest") != digest(message.content, "request"):
            raise ReplyError("a request is damaged: its contents do not match its digest")
        stamp = Stamp(**{item.name: values.pop(item.name) for item in fields(Stamp)})
        for name, text in {"run": stamp.run, "role": stamp.role.replace("/", "-")}.items():  # nodes have folders of these names
            if not is_folder_name(text):
                raise ReplyError(f"the {name} of a request is {text!r}, which is no plain folder name; this node refuses")
        config = restore(json.loads(values.pop("config")))
        arrays = _unpack(message.content["arrays"]) if "arrays" in message.content else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReplyError(f"a request lacks {error} or is not of wire protocol {PROTOCOL}") from None
    late = time.time() - message.metadata.created_at - message.metadata.ttl
    if late > 0:  # it waited here while the node was busy
        raise ReplyError(f"{stamp}: the request was given up {late:.0f} s ago (or the clocks differ by as much); nothing is done")
    return Request(stamp, config, values, arrays)


def reply(
    to: Message, stamp: Stamp, metrics: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None, **values: Any
) -> Message:
    """A node's answer: its stamp, numbers (floats, or lists of them), arrays and further scalars.

    ``busy`` is the seconds it took, and ``holds`` the :class:`Holdings` of a role as JSON.
    """
    content = RecordDict({"reply": ConfigRecord({"protocol": PROTOCOL, **asdict(stamp), "error": "", **values})})
    if metrics:
        content["metrics"] = MetricRecord(dict(metrics))
    if arrays:
        content["arrays"] = _pack(arrays)
    seal(content, "reply")
    return Message(content, reply_to=to)


def refusal(to: Message, stamp: Stamp | None, reason: str, *, final: bool = False) -> Message:
    """A node's answer when it cannot do what was asked, with the reason in one line, and whether it would say the same again."""
    bound = stamp or Stamp("", "", -1, "", "")
    content = RecordDict({"reply": ConfigRecord({"protocol": PROTOCOL, **asdict(bound), "error": reason, "final": final})})
    seal(content, "reply")
    return Message(content, reply_to=to)


@dataclass(frozen=True)
class Reply:
    """A reply whose stamp and digest have been checked; its parts are read through methods that check them.

    ``busy`` is the time in seconds that the node says it worked; what a round took beyond that is messaging. ``holds`` is what it worked with.
    """

    stamp: Stamp
    values: dict[str, Any]
    metrics: dict[str, Any]
    arrays: dict[str, Array]
    n_bytes: int
    busy: float
    holds: Holdings | None

    def text(self, name: str) -> str:
        """A string among the values."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise ReplyError(f"{self.stamp}: {name} is {value!r}, a string is needed")
        return value

    def integer(self, name: str, low: int = 0) -> int:
        """An integer among the values, at least ``low``."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ReplyError(f"{self.stamp}: {name} is {value!r}, a whole number of at least {low} is needed")
        return value

    def flag(self, name: str) -> bool:
        """A boolean among the values."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise ReplyError(f"{self.stamp}: {name} is {value!r}, true or false is needed")
        return value

    def numbers(self, required: Sequence[str]) -> dict[str, float]:
        """All metrics as finite floats; those required must be there."""
        self._known(required)
        return {name: self._finite(name, value) for name, value in self.metrics.items()}

    def rows(self, required: Sequence[str]) -> list[dict[str, float]]:
        """Metrics that are lists of one length, as rows."""
        lengths = {len(value) if isinstance(value, list) else -1 for value in self.metrics.values()}
        if not self.metrics:
            return []
        if len(lengths) != 1 or -1 in lengths:
            raise ReplyError(f"{self.stamp}: its metrics are not lists of one length")
        self._known(required)
        return [{name: self._finite(name, values[row]) for name, values in self.metrics.items()} for row in range(lengths.pop())]

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype, bound: float) -> np.ndarray:
        """A finite array of exactly this shape and dtype, no entry larger than the bound in absolute value."""
        if name not in self.arrays:
            raise ReplyError(f"{self.stamp}: array {name!r} is missing (it has {', '.join(self.arrays) or 'none'})")
        array = self._unpack(name)
        if array.shape != shape or array.dtype != dtype:
            raise ReplyError(f"{self.stamp}: array {name!r} is {array.dtype} {array.shape}, {dtype} {shape} is needed")
        if not np.isfinite(array).all():
            raise ReplyError(f"{self.stamp}: array {name!r} has {int((~np.isfinite(array)).sum())} NaN or infinite entries")
        largest = max(float(array.max(initial=0)), -float(array.min(initial=0)))
        if largest > bound:
            raise ReplyError(
                f"{self.stamp}: array {name!r} has an entry of size {largest:g}, at most {bound:g} is agreed (distillation.margin-bound)"
            )
        return array

    def weights(self, like: Mapping[str, np.ndarray] | None, prefix: str = "weights/") -> dict[str, np.ndarray]:
        """The arrays ``weights/<parameter>``: finite float32, and of the names and shapes of ``like`` where that is known."""
        found = {key.removeprefix(prefix): self._unpack(key) for key in self.arrays if key.startswith(prefix)}
        if not found or (like is not None and set(found) != set(like)):
            different = sorted(set(found) ^ set(like or {}))
            raise ReplyError(f"{self.stamp}: its parameters are not those of the student (different: {', '.join(different[:5]) or 'none sent'})")
        for name, array in found.items():
            if like is not None and array.shape != like[name].shape:
                raise ReplyError(f"{self.stamp}: parameter {name} has shape {array.shape}, {like[name].shape} is needed")
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ReplyError(
                    f"{self.stamp}: parameter {name} is {array.dtype} with {int((~np.isfinite(array)).sum())} values that are not finite"
                )
        return found

    def _known(self, required: Sequence[str]) -> None:
        """Those required are there, and no name that would mean something else in the record."""
        for name in required:
            if name not in self.metrics:
                raise ReplyError(f"{self.stamp}: metric {name!r} is missing")
        for name in self.metrics:
            if not _METRIC.fullmatch(name):
                raise ReplyError(f"{self.stamp}: it has a metric {name!r}, which is none of this framework's")

    def _unpack(self, name: str) -> np.ndarray:
        try:
            return unpack_array(self.arrays[name])
        except (ValueError, TypeError) as error:
            raise ReplyError(f"{self.stamp}: array {name!r} cannot be read: {error}") from None

    def _finite(self, name: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ReplyError(f"{self.stamp}: metric {name!r} is {value!r}, a finite number is needed")
        if "@" in name and not name.startswith("sum/") and not 0 <= value <= 1:
            raise ReplyError(f"{self.stamp}: metric {name!r} is {value!r}, a share between 0 and 1 is needed")
        return float(value)


def read_reply(message: Message, expected: Stamp) -> Reply:
    """Check a reply's stamp against the request's.

    Raises:
        ReplyError: the node failed, refused (:class:`FinalError` if for good), or answered something else than it was asked.
    """
    if message.has_error():
        kind = ReplyError if message.error.code == _RAISED else LostError
        raise kind(f"{expected} failed: {_short(message.error.reason or '')} (Flower error code {message.error.code})")
    content = message.content
    if "reply" not in content or not isinstance(content["reply"], ConfigRecord):
        raise ReplyError(f"{expected}: the reply is not of this framework's form (it has {', '.join(content) or 'nothing'})")
    values: dict[str, Any] = dict(content["reply"])
    if values.pop("protocol", None) != PROTOCOL:
        raise ReplyError(f"{expected}: the node speaks another wire protocol than {PROTOCOL}; install the same version of ckd_fed everywhere")
    if values.pop("digest", None) != digest(content, "reply"):
        raise ReplyError(f"{expected}: the reply is damaged: its contents do not match its digest")
    error, final = values.pop("error", ""), values.pop("final", False)
    got = {item.name: values.pop(item.name, None) for item in fields(Stamp)}
    if error:
        raise (FinalError if final is True else ReplyError)(f"{expected.role}: {_short(str(error))}")
    if got != asdict(expected):
        wrong = ", ".join(f"{name} {got[name]!r} instead of {value!r}" for name, value in asdict(expected).items() if got[name] != value)
        raise ReplyError(f"{expected}: the reply is bound to something else ({wrong}); it is not used")
    metrics = content.get("metrics", MetricRecord())
    arrays = content.get("arrays", ArrayRecord())
    if not isinstance(metrics, MetricRecord) or not isinstance(arrays, ArrayRecord):
        raise ReplyError(f"{expected}: metrics or arrays are of the wrong kind")
    busy = values.pop("busy", 0.0)
    if not isinstance(busy, float) or not 0 <= busy < math.inf:
        raise ReplyError(f"{expected}: busy is {busy!r}, a number of seconds is needed")
    return Reply(expected, values, dict(metrics), dict(arrays), content_bytes(message), busy, _holdings(expected, values.pop("holds", None)))


def read_json(text: str) -> Any:
    """JSON that a node sent.

    Raises:
        ValueError: it is none, or nested so deeply that Python gives up on it (which json says by another error).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _holdings(stamp: Stamp, said: object) -> Holdings | None:
    if said is None:
        return None
    try:
        holds = Holdings(**read_json(str(said)))
    except (TypeError, ValueError) as error:
        raise ReplyError(f"{stamp}: what the node says that it holds cannot be read: {error}") from None
    if not isinstance(holds.code, str) or not isinstance(holds.split, str) or not isinstance(holds.features, dict):
        raise ReplyError(f"{stamp}: the node says that it holds {holds!r}")
    return holds


def read_card(answer: Reply) -> NodeCard:
    """The card in a reply to enrolment.

    Raises:
        ReplyError: it cannot be read, or says what no node can be: a size out of range, a text that would pass for lines of the server's own.
    """
    try:
        card = NodeCard(**read_json(answer.text("card")))
    except (TypeError, ValueError) as error:
        raise ReplyError(f"{answer.stamp}: its card cannot be read: {error}") from None
    kinds = {"int": int, "str": str, "bool": bool}
    for item in fields(NodeCard):
        said = getattr(card, item.name)
        if type(said) is not kinds[str(item.type)] or (isinstance(said, str) and not _is_short(said, _TEXTS.get(item.name))):
            raise ReplyError(f"{answer.stamp}: its card has {item.name} = {ascii(said)[:120]}")
    if not all(1 <= size <= _LARGEST for size in (card.n_users, card.n_items, card.n_train)):
        raise ReplyError(f"{answer.stamp}: its card has {card.n_users} users, {card.n_items} items and {card.n_train} interactions")
    if not all(1 <= n <= card.n_users for n in (card.n_val_users, card.n_test_users)):
        raise ReplyError(f"{answer.stamp}: its card has {card.n_val_users} users to validate and {card.n_test_users} to test, of {card.n_users}")
    try:
        features = read_json(card.features)
    except ValueError:
        features = None
    if not isinstance(features, dict) or not all(isinstance(said, str) for said in features.values()):
        raise ReplyError(f"{answer.stamp}: its card has features = {card.features!r}")
    return card


def digest(content: RecordDict, record: str) -> str:
    """sha256 of everything in a message but the digest itself: detects damage, while keys and TLS are what tells who sent it.

    Args:
        content: of the message.
        record: the record that carries the digest, ``request`` or ``reply``.
    """
    total = hashlib.sha256()
    for name in sorted(content):
        part = content[name]
        total.update(f"{name}\0{type(part).__name__}\0".encode())
        if isinstance(part, ArrayRecord):
            for key in sorted(part):
                array = part[key]
                total.update(json.dumps([key, array.dtype, list(array.shape), array.stype, len(array.data)]).encode())
                total.update(array.data)
        else:
            total.update(json.dumps({key: part[key] for key in sorted(part) if (name, key) != (record, "digest")}, default=repr).encode())
    return total.hexdigest()


def seal(content: RecordDict, record: str) -> None:
    """Put its digest into a message's contents."""
    content.config_records[record]["digest"] = digest(content, record)


def margin_dtype(config: Config) -> np.dtype:
    """The dtype of soft scores on the wire."""
    return DTYPES[config.distillation.margin_dtype]


def content_bytes(message: Message) -> int:
    """Payload of a message: its arrays, as good as all of what travels."""
    if message.has_error() or "arrays" not in message.content:
        return 0
    return sum(len(array.data) for array in message.content.array_records["arrays"].values())


def _pack(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays as raw little-endian bytes: no .npy parsing of what a stranger sends, and no copy more than needed."""
    return ArrayRecord(
        {
            name: Array(dtype=array.dtype.newbyteorder("<").str, shape=tuple(array.shape), stype="raw", data=np.ascontiguousarray(array).tobytes())
            for name, array in arrays.items()
        }
    )


def _unpack(record: Any) -> dict[str, np.ndarray]:
    return {name: unpack_array(array) for name, array in record.items()}


def unpack_array(array: Array) -> np.ndarray:
    """One array from its bytes; read-only.

    Raises:
        ValueError: a dtype other than float16, float32 and int32, or a size that does not fit the shape.
    """
    if array.stype != "raw" or array.dtype not in ("<f2", "<f4", "<i4"):
        raise ValueError(f"it is {array.dtype!r} stored as {array.stype!r}; raw float16, float32 or int32 is needed")
    shape = tuple(int(length) for length in array.shape)
    if min(shape, default=1) < 0 or math.prod(shape) * np.dtype(array.dtype).itemsize != len(array.data):
        raise ValueError(f"shape {shape} of {array.dtype} does not fit {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype=array.dtype).reshape(shape)


def _is_short(text: str, longest: int | None) -> bool:
    """Whether a text can be shown to people; None for any text."""
    return longest is None or (len(text) <= longest and text.isprintable())


def _short(reason: str) -> str:
    """The last telling line of a traceback, or the text itself, in one line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[:600]
