"""What a node keeps between messages.

In a deployment every message is handled by a fresh process, so whatever must survive one lives here: parameters, optimiser state,
early stopping and the best parameters of a role, as one file that is replaced atomically. A cache in memory saves reading it again
where the process does survive (a simulation); it counts only while it matches the file.

A node may be ahead of the server: it trained a round, and the answer was lost or the server died before it took the answer. So a state
holds what was answered, and the state before it can be kept (``previous.safetensors``), to repeat a round or to do it again.
"""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckd_fed.checkpoint import load_checkpoint, load_state, save_checkpoint
from ckd_fed.errors import DataError
from ckd_fed.training.fit import Fit
from ckd_fed.training.fit_state import fit_state, restore_fit


class Workspace:
    """One role's place on a node's disk: ``<home>/workspace/<run>/<role>/state.safetensors``.

    Keyed on run and role, never on Flower's node id: a node that comes back under another id is the same teacher.

    Args:
        root: ``<home>/workspace``.
        run: name of the run.
        role: ``teacher/<m>``, ``plain`` or ``student/<w>``.
    """

    def __init__(self, root: Path, run: str, role: str) -> None:
        self.role = role
        self.path = root / run / role.replace("/", "-") / "state.safetensors"

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    @property
    def previous(self) -> Path:
        """The state before the last one, where it was kept."""
        return self.path.with_name("previous.safetensors")

    def save(self, fit: Fit, *, keep_previous: bool = False, **more: Any) -> str:
        """Write a fit's whole state and further JSON-able values; returns the state's id."""
        if keep_previous and self.exists:
            self._keep()
        state_id = uuid.uuid4().hex
        arrays, values = fit_state(fit)
        save_checkpoint(self.path, arrays, {"id": state_id, "role": self.role, **values, **more}, private=True)  # a teacher's parameters are its own
        return state_id

    def load(self, fit: Fit, *, previous: bool = False) -> dict[str, Any]:
        """Load a fit's state (or the state before it) and return the values saved beside it.

        Raises:
            DataError: nothing was saved, or the file is damaged or belongs to another model.
        """
        path = self.previous if previous else self.path
        arrays, state = load_checkpoint(path)
        try:
            restore_fit(fit, arrays, state)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise DataError(f"{path} does not fit this run's model: {str(error).splitlines()[0]}") from None
        return state

    def state_id(self) -> str:
        """Id of the state on disk; empty where there is none, or a damaged one."""
        try:
            return str(load_state(self.path)["id"]) if self.exists else ""
        except (DataError, KeyError, TypeError):
            return ""

    def set_aside(self, *, previous: bool = False) -> Path:
        """Rename a damaged state (or the one before it), to be looked at by people; returns its new path."""
        path = self.previous if previous else self.path
        return path.replace(path.with_name(f"{path.name}.damaged"))

    def _keep(self) -> None:
        """Give the file of the present state a second name; there is no moment without a whole state."""
        spare = self.previous.with_suffix(".new")
        spare.unlink(missing_ok=True)
        try:
            os.link(self.path, spare)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.path, spare)
        os.replace(spare, self.previous)


def held_roles(root: Path, run: str) -> dict[str, int]:
    """Role -> epochs trained, of a run's roles in this node's workspace; a damaged state counts as absent."""
    held = {}
    for path in sorted((root / run).glob("*/state.safetensors")):
        try:
            state = load_state(path)
            held[str(state["role"])] = int(state["epoch"])
        except (DataError, KeyError, ValueError, TypeError):
            continue
    return held


def delete_states(root: Path, run: str) -> None:
    """Delete a run's states in this node's workspace, and the folders that this leaves empty; what else lies there stays."""
    for path in (root / run).glob("*/*.safetensors*"):
        path.unlink(missing_ok=True)
    for folder in (*(root / run).glob("*/"), root / run):
        with suppress(OSError):  # something else is in it, or another node of this machine was faster
            folder.rmdir()
