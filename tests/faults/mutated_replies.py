"""Mutated replies; see mutations.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from faults.mutated_files import write_toy
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from loopback import LoopbackGrid, seal, simulated

from ckd_fed.errors import CkdError
from ckd_fed.wire import read_card, read_reply
from server.exchange import Exchange
from server.session import run_federation

Random = np.random.Generator
QUICK = {
    "dataset": "toy", "model.embedding-dim": 4, "training.epochs": 4, "training.validate-every": 2, "training.batch-size": 16,
    "training.threads": 1, "distillation.batch-size": 20, "federation.teacher-epochs": 2, "federation.student-workers": 2,
    "federation.enrol-timeout": 5, "tracking.wandb": "off", "tracking.report": False, "plain": True, "name": "mutations",
}  # fmt: skip


def record_replies(home: Path) -> list[tuple[Message, Callable[[Message], object], str]]:
    """Run a federation; every reply of it, how the server checks it, and its action."""
    for name in ("_run_id", "_task_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    write_toy(home / "data" / "toy")
    sent = []
    original = Exchange.send

    def send(self, asks, seconds):
        items = original(self, asks, seconds)
        sent.extend(items)
        return items

    Exchange.send = send  # type: ignore[method-assign]
    try:
        _, grid, _ = _federate(home)
    finally:
        Exchange.send = original  # type: ignore[method-assign]
    replies = {reply.metadata.reply_to_message_id: reply for _, reply in grid.seen}
    material = []
    for item in sent:

        def judge(message: Message, item=item) -> object:
            reply = read_reply(message, item.stamp)
            return read_card(reply) if item.ask.action == "enrol" else item.ask.check(reply)

        if item.ask.action == "distil" and not item.ask.arrays.keys() & {"weights/user_embedding"}:
            continue  # a worker's first reply is what tells the server which parameters a student has
        judge(replies[item.message_id])
        material.append((replies[item.message_id], judge, item.ask.action))
    return material


def _federate(home: Path):
    grid = LoopbackGrid(simulated(4))
    session = run_federation(grid, {**QUICK, "home": str(home)}, 1, lambda line: None)
    return session.result, grid, session.federation


def copy(message: Message) -> Message:
    """A message of its own, as after the wire."""
    return message_from_proto(message_to_proto(message))


def _set(message: Message, record: str, kind: type, **entries: object) -> Message:
    values = {**dict(message.content[record]), **entries}
    message.content[record] = kind({name: value for name, value in values.items() if value is not ...})
    return message


def _pick(rng: Random, names) -> str:
    return str(sorted(names)[int(rng.integers(len(names)))])


def damage(message: Message, rng: Random) -> Message | None:
    """Change something without touching the digest."""
    kinds = [name for name in ("reply", "metrics", "arrays") if name in message.content]
    record = kinds[int(rng.integers(len(kinds)))]
    if record == "arrays":
        name = _pick(rng, message.content["arrays"])
        array = message.content["arrays"][name]
        data = bytearray(array.data)
        if not data:
            return None
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        changed = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=bytes(data))
        return _set(message, "arrays", ArrayRecord, **{name: changed})
    if record == "metrics":
        name = _pick(rng, message.content["metrics"])
        value = message.content["metrics"][name]
        if isinstance(value, list):
            changed_list = list(value)
            at = int(rng.integers(len(changed_list)))
            changed_list[at] = changed_list[at] * 1.25 + 0.125
            return _set(message, "metrics", MetricRecord, **{name: changed_list})
        return _set(message, "metrics", MetricRecord, **{name: value * 1.25 + 0.125})
    name = _pick(rng, [name for name in message.content["reply"] if name not in ("error",)])
    value = message.content["reply"][name]
    if isinstance(value, bool):
        return _set(message, "reply", ConfigRecord, **{name: not value})
    if isinstance(value, (int, float)):
        return _set(message, "reply", ConfigRecord, **{name: value + 1})
    if isinstance(value, str):
        at = int(rng.integers(len(value)))
        return _set(message, "reply", ConfigRecord, **{name: value[:at] + chr(33 + (ord(value[at]) - 32) % 90) + value[at + 1 :]})
    return _set(message, "reply", ConfigRecord, **{name: [*value, value[0]]})


def lie_stamp(message: Message, rng: Random) -> Message:
    changes = [
        {"run": "another"},
        {"run": message.content["reply"]["run"] + "x"},
        {"action": "enrol" if message.content["reply"]["action"] != "enrol" else "fit"},
        {"round": message.content["reply"]["round"] + int(rng.integers(1, 9))},
        {"round": message.content["reply"]["round"] - 1},
        {"role": "teacher/smell"},
        {"role": ...},
        {"nonce": "0" * 32},
        {"nonce": ...},
        {"protocol": 1},
        {"protocol": "2"},
        {"protocol": ...},
        {"round": float(message.content["reply"]["round"]) + 0.5},
        {"error": "the disk is full"},
        {"busy": -1.0},
        {"busy": "long"},
        {"busy": float("nan")},
    ]
    return _set(message, "reply", ConfigRecord, **changes[int(rng.integers(len(changes)))])


def lie_value(message: Message, rng: Random) -> Message | None:
    """A value of the reply of another type or out of range."""
    others = ("protocol", "run", "action", "round", "role", "nonce", "error", "digest", "busy", "holds")
    own = [name for name in message.content["reply"] if name not in others]
    if not own:
        return None
    name = _pick(rng, own)
    value = message.content["reply"][name]
    wrong: list[object] = [..., b"\0\1", [1.5]]
    if isinstance(value, bool):
        wrong += [int(value), str(value), [value]]
    elif isinstance(value, int):
        wrong += [-2, 10**12, float(value) + 0.5, str(value), [value], True]
    elif isinstance(value, str):
        wrong += ["", "{", "null", "[]", value[: len(value) // 2], value[1:], 7]
    else:
        wrong += [[], [*value, "f" * 64], [7], value[0]]
    return _set(message, "reply", ConfigRecord, **{name: wrong[int(rng.integers(len(wrong)))]})


def lie_metric(message: Message, rng: Random) -> Message | None:
    if "metrics" not in message.content:
        return None
    metrics = message.content["metrics"]
    name = _pick(rng, metrics)
    value = metrics[name]
    if isinstance(value, list):
        wrong: list[object] = [[*value, 1.0], value[:-1] or [0.5, 0.5], [float("nan")] * len(value), [float("inf")] * len(value), float(value[0])]
    else:
        wrong = [float("nan"), float("inf"), float("-inf"), [value], [], [value, value]]
        if "@" in name:
            wrong += [-0.25, 1e9]
        if name.startswith("effect/"):
            wrong += [0.0, -1.0, 10.5]
        if name.startswith("weight/"):
            wrong += [value + 0.5, -1.0]
    if rng.integers(4) == 0:
        stray = ("event", "round", "time", "phase", "a b", "", "loss/../x\n")[int(rng.integers(7))]
        return _set(message, "metrics", MetricRecord, **{stray: value})
    return _set(message, "metrics", MetricRecord, **{name: wrong[int(rng.integers(len(wrong)))]})


def lie_array(message: Message, rng: Random) -> Message | None:
    if "arrays" not in message.content or not len(message.content["arrays"]):
        return None
    arrays = message.content["arrays"]
    name = _pick(rng, arrays)
    array = arrays[name]
    values = np.frombuffer(array.data, dtype=array.dtype).reshape(array.shape)

    def packed(changed: np.ndarray, **override) -> Array:
        form = {"dtype": changed.dtype.str, "shape": tuple(changed.shape), "stype": "raw", "data": changed.tobytes(), **override}
        return Array(**form)

    def poisoned(value: float) -> np.ndarray:
        changed = values.copy()
        if changed.dtype.kind == "i":  # ids of users have no NaN
            limits = np.iinfo(changed.dtype)
            value = limits.max if value > 0 else limits.min
        changed.flat[int(rng.integers(changed.size))] = value
        return changed

    changes: list[object] = [
        ...,
        packed(poisoned(float("nan"))),
        packed(poisoned(float("inf"))),
        packed(poisoned(float("-inf"))),
        packed(values[:-1]),
        packed(values[None]),
        packed(np.concatenate([values, values])),
        packed(values.astype("<f8")),
        packed(values.astype("<f2" if values.dtype == np.float32 else "<f4")),
        packed(values, data=values.tobytes()[:-1]),
        packed(values, data=b""),
        packed(values, shape=(-1, -values.size)),
        packed(values, shape=(2**20, 2**20)),
        packed(values, stype="numpy.ndarray"),
        packed(values, dtype="|O"),
        packed(values, dtype=">f4"),
        packed(values.astype("<i4")),
    ]
    if rng.integers(6) == 0:
        del message.content["arrays"]
        return message
    return _set(message, "arrays", ArrayRecord, **{name: changes[int(rng.integers(len(changes)))]})


def lie_form(message: Message, rng: Random) -> Message:
    whole = [
        lambda: Message(RecordDict(), reply_to=message),
        lambda: Message(RecordDict({"reply": MetricRecord({"a": 1.0})}), reply_to=message),
        lambda: Message(RecordDict({"answer": message.content["reply"]}), reply_to=message),
        lambda: Message(RecordDict({"reply": ConfigRecord({})}), reply_to=message),
        lambda: Message(RecordDict({**dict(message.content), "metrics": ConfigRecord({"a": 1})}), reply_to=message),
        lambda: Message(RecordDict({**dict(message.content), "arrays": MetricRecord({"a": 1.0})}), reply_to=message),
        lambda: Message(Error(2, "Traceback\nValueError: boom"), reply_to=message),
        lambda: Message(Error(5, ""), reply_to=message),
        lambda: Message(Error(3), reply_to=message),
    ]
    return whole[int(rng.integers(len(whole)))]()


LIES = (lie_stamp, lie_value, lie_metric, lie_array, lie_form)


def mutate_replies(home: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Judge ``count`` mutated replies; (how many of each kind were refused, what went wrong)."""
    material, rng = record_replies(home), np.random.default_rng(seed)
    refused: Counter = Counter()
    wrong: list[str] = []
    while refused.total() + len(wrong) < count:
        original, judge, action = material[int(rng.integers(len(material)))]
        kind = int(rng.integers(4))
        if kind == 0:
            name, mutated = "damage", damage(copy(original), rng)
        elif kind == 1:
            other = material[int(rng.integers(len(material)))][0]
            name, mutated = "replay", None if other is original else copy(other)
        else:
            lie = LIES[int(rng.integers(len(LIES)))]
            name, mutated = lie.__name__, lie(copy(original), rng)
            seal(mutated)
        if mutated is None:
            continue
        try:
            judge(copy(mutated))
            wrong.append(f"accepted: {name} of {action}")
        except CkdError as error:
            refused[f"{name}"] += 1
            if "\n" in str(error) or len(str(error)) < 15:
                wrong.append(f"unclear: {name} of {action}: {error!r}")
        except Exception as error:
            wrong.append(f"crash: {name} of {action}: {type(error).__name__}: {error}")
    return refused, wrong
