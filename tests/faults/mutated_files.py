"""Mutated data files; see mutations.py."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ckd_fed.data.dataset import SPLITS, load_dataset
from ckd_fed.errors import DataError

Random = np.random.Generator


def write_toy(directory: Path, seed: int = 0) -> None:
    """A small random dataset without faults, with a mask."""
    rng = np.random.default_rng(seed)
    n_users, n_items = 30, 25
    tables: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    for user in range(n_users):
        items = rng.permutation(n_items).tolist()
        if user == 0:
            items = [n_items - 1, *[item for item in items if item != n_items - 1]]  # the ids show all items
        tables["train"][str(user)], tables["val"][str(user)], tables["test"][str(user)] = items[:5], items[5:7], items[7:9]
    directory.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        (directory / f"{split}.json").write_text(json.dumps(table))
    for modality, width in {"image": 6, "text": 5}.items():
        np.save(directory / f"{modality}_feat.npy", rng.normal(size=(n_items, width)).astype(np.float32))
    np.save(directory / "text_mask.npy", np.arange(n_items) % 4 > 0)


def damaged(content: bytes, rng: Random) -> bytes:
    """Cut off, lengthen, or overwrite, insert or delete a few bytes."""
    data = bytearray(content)
    kind = int(rng.integers(5))
    if kind == 0:
        return bytes(data[: int(rng.integers(len(data)))])
    if kind == 1:
        return bytes(data) + rng.bytes(int(rng.integers(1, 20)))
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data)))
        if kind == 2:
            del data[at]
        elif kind == 3:
            data.insert(at, int(rng.integers(256)))
        else:
            data[at] = int(rng.integers(256))
    return bytes(data)


def changed_split(content: bytes, rng: Random) -> bytes:
    """A split file that is valid JSON and wrong."""
    table = json.loads(content)
    user = str(int(rng.integers(len(table))))
    changes: list[Callable[[], object]] = [
        lambda: table.pop(user),
        lambda: table.update({user: []}),
        lambda: table[user].append(table[user][0]),
        lambda: table[user].append(10**6),
        lambda: table[user].append(-1),
        lambda: table[user].append(1.5),
        lambda: table[user].append("7"),
        lambda: table.update({user: 5}),
        lambda: table.update({"x": [1]}),
        lambda: table.update({"-1": [1]}),
        lambda: table.update({str(10**9): [1]}),
        lambda: table.update({user: None}),
        lambda: table[user].pop(),
        lambda: table[user].append(int(rng.integers(24))),
        lambda: table[user].append(True),
        lambda: table[user].append(2**70),
    ]
    changes[int(rng.integers(len(changes)))]()
    return json.dumps(table).encode()


def changed_matrix(path: Path, rng: Random) -> None:
    """A feature file that is a valid .npy and wrong or different."""
    matrix = np.load(path)
    changes: list[Callable[[], np.ndarray]] = [
        lambda: matrix[:-1],
        lambda: np.concatenate([matrix, matrix]),
        lambda: matrix.astype(np.int32),
        lambda: matrix.astype(np.complex64),
        lambda: np.where(np.arange(matrix.size).reshape(matrix.shape) == 3, np.nan, matrix),
        lambda: matrix[None],
        lambda: matrix.ravel(),
        lambda: np.where(np.arange(matrix.size).reshape(matrix.shape) == 5, np.inf, matrix),
        lambda: matrix[:, :0],
        lambda: matrix * 1.5,
        lambda: matrix[::-1].copy(),
    ]
    np.save(path, changes[int(rng.integers(len(changes)))]())


def mutate_files(home: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Judge ``count`` mutated data files; (how many were refused and where, what went wrong)."""
    clean, folder, rng = home / "clean", home / "mutated", np.random.default_rng(seed)
    write_toy(clean)
    original = load_dataset(clean)
    refused: Counter = Counter()
    wrong: list[str] = []
    names = sorted(path.name for path in clean.iterdir())
    while refused.total() + len(wrong) < count:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(clean, folder)
        path = folder / names[int(rng.integers(len(names)))]
        before = path.read_bytes()
        if rng.integers(2):
            path.write_bytes(damaged(before, rng))
        elif path.suffix == ".json":
            path.write_bytes(changed_split(before, rng))
        elif path.name.endswith("_feat.npy"):
            changed_matrix(path, rng)
        else:
            np.save(path, np.roll(np.load(path), int(rng.integers(1, 4))))
        if path.read_bytes() == before:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = load_dataset(folder)
            if dataset.fingerprint != original.fingerprint:
                refused["at enrolment, by the split's fingerprint"] += 1
            elif dataset.feature_fingerprints != original.feature_fingerprints:
                refused["pointed out at enrolment, by the features' fingerprint"] += 1
            # else: the same dataset written differently (a blank more, an order within a user), which is no mutation
        except DataError as error:
            refused["on loading"] += 1
            if "\n" in str(error):
                wrong.append(f"unclear: {path.name}: {error!r}")
        except Exception as error:
            wrong.append(f"crash: {path.name}: {type(error).__name__}: {error}")
    return refused, wrong
