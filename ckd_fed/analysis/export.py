"""A trained student as files that other programs read: embeddings as safetensors, ranked lists as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from ckd_fed.analysis.history import RunHistory
from ckd_fed.analysis.recommend import seen_items, top_lists
from ckd_fed.analysis.student import Student
from ckd_fed.errors import ConfigError
from ckd_fed.files import write_atomically

EMBEDDINGS, LISTS, USERS, ITEMS = "embeddings.safetensors", "top_items.jsonl", "users.json", "items.json"
_USERS_AT_A_TIME = 4096


def export(student: Student, history: RunHistory, folder: Path, k: int) -> list[Path]:
    """Write ``embeddings.safetensors``, ``top_items.jsonl``, ``users.json`` and ``items.json``.

    The safetensors file holds ``joint/users``, ``joint/items`` and, for every modality m, ``only/<m>/users`` and ``only/<m>/items``,
    float32; inner products order a user's items as the view's scores do. ``users.json`` and ``items.json`` list the source's ids of
    their rows. The JSON lines are ``{"user", "index", "items", "indices", "scores"}``, the best k items of every user, training and validation
    items left out: ``user`` and ``items`` are the source's ids, ``index`` and ``indices`` the rows.

    Raises:
        ConfigError: k is not positive.
        OSError: the folder cannot be written.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; at least one item must be asked for")
    backbone = student.backbone
    views = {"joint": backbone.joint, **{f"only/{m}": backbone.only(m) for m in backbone.modalities}}
    arrays: dict[str, np.ndarray] = {}
    for name, view in views.items():
        users, items = student.tables(view)
        arrays.update({f"{name}/users": np.ascontiguousarray(users.cpu()), f"{name}/items": np.ascontiguousarray(items.cpu())})
    facts = {"run": history.name, "dataset": student.config.dataset, "backbone": student.config.backbone, "split": student.dataset.fingerprint}
    write_atomically(folder / EMBEDDINGS, save(arrays, metadata=facts))

    joint, seen = student.tables(), seen_items(student.dataset)
    user_ids, item_ids = student.dataset.user_ids, student.dataset.item_ids
    lines = []
    for start in range(0, student.dataset.n_users, _USERS_AT_A_TIME):
        ids = np.arange(start, min(start + _USERS_AT_A_TIME, student.dataset.n_users))
        for user, items_of, scores in zip(ids, *top_lists(joint, seen, ids, k), strict=True):
            row = {
                "user": user_ids[user],
                "index": int(user),
                "items": [item_ids[item] for item in items_of],
                "indices": items_of.tolist(),
                "scores": [round(float(score), 6) for score in scores],
            }
            lines.append(json.dumps(row, ensure_ascii=False))
    write_atomically(folder / LISTS, ("\n".join(lines) + "\n").encode())
    for name, names in ((USERS, user_ids), (ITEMS, item_ids)):
        write_atomically(folder / name, json.dumps(names, ensure_ascii=False).encode())
    return [folder / name for name in (EMBEDDINGS, LISTS, USERS, ITEMS)]
