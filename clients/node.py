"""One node: its data, its device, and the models of the roles it plays."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ckd_fed.backbones.build import backbone_class
from ckd_fed.config import Config
from ckd_fed.data.dataset import Dataset, load_dataset
from ckd_fed.data.locate import locate, shown_name
from ckd_fed.errors import ConfigError, DataError, ReplyError, unknown
from ckd_fed.home import code_version, home
from ckd_fed.tracking.console import write
from ckd_fed.training.build import build_fit, build_trainer, choose_device
from ckd_fed.training.fit import Fit
from ckd_fed.wire import Holdings, NodeCard
from clients.ledger import Ledger
from clients.workspace import Workspace, delete_states, held_roles

ROLES = ("teacher", "student")


@dataclass
class _Cached:
    state_id: str
    fit: Fit
    state: dict[str, Any]
    exact: bool  # the parameters are those of the file, not its best ones nor the server's


_FITS: dict[Path, _Cached] = {}


@dataclass(frozen=True)
class Node:
    """A node as its node-config describes it.

    ``role`` (teacher or student), ``modality`` (of a teacher), ``data-dir``, ``device``, ``home`` and ``score-budget`` (of a teacher, see
    :class:`~clients.ledger.Ledger`) are read from the node-config of a real node. A simulated node has only its place among the others;
    the server gives it roles.
    """

    config: Config
    node_config: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        return choose_device(str(self.node_config.get("device", "")) or self.config.training.device)

    def dataset(self, role: str) -> Dataset:
        """The dataset with the modalities of a role: a teacher opens its own modality's file and no other."""
        if role.startswith("teacher/"):
            return self._dataset((role.removeprefix("teacher/"),), at_least=1)
        return self._dataset(self.config.modalities or None, at_least=2)

    def card(self, run: str) -> NodeCard:
        """What this node says of itself at enrolment to a run; loads and checks its data."""
        role, modality = str(self.node_config.get("role", "")), str(self.node_config.get("modality", ""))
        simulated = "partition-id" in self.node_config
        if role and role not in ROLES:
            raise ConfigError(f"node-config: {unknown('role', role, ROLES)}")
        if not role and not simulated:
            raise ConfigError('this node has no role; start it with --node-config \'role="teacher" modality="text"\' or \'role="student"\'')
        if role == "teacher" and not modality:
            raise ConfigError('node-config: a teacher needs its modality, for example \'role="teacher" modality="text"\'')
        dataset = self.dataset(f"teacher/{modality}") if role == "teacher" else self.dataset(role or "student")
        return NodeCard(
            role=role,
            modality=modality,
            partition=int(self.node_config.get("partition-id", -1)),
            partitions=int(self.node_config.get("num-partitions", 0)),
            code=code_version(),
            split=dataset.fingerprint,
            n_users=dataset.n_users,
            n_items=dataset.n_items,
            n_train=len(dataset.train),
            n_val_users=len(dataset.val.users),
            n_test_users=len(dataset.test.users),
            modalities=",".join(dataset.modalities),
            features=json.dumps(dataset.feature_fingerprints),
            dataset=dataset.describe(),
            standin=dataset.standin,
            counterfactual=backbone_class(self.config.backbone).scores_use_features,
            device=str(self.device),
            host=platform.node(),
            held=json.dumps(held_roles(self._workspaces, run)),
        )

    def holds(self, role: str) -> Holdings:
        """What this node works with in a role."""
        dataset = self.dataset(role)
        return Holdings(code_version(), dataset.fingerprint, dataset.feature_fingerprints)

    def workspace(self, run: str, role: str) -> Workspace:
        """A role's place on this node's disk.

        Raises:
            ReplyError: a real node is asked to play another role than its own; a teacher that played the student would send parameters.
        """
        own, modality = self.node_config.get("role", ""), self.node_config.get("modality", "")
        if (own == "teacher" and role != f"teacher/{modality}") or (own == "student" and role.startswith("teacher/")):
            raise ReplyError(f"this node is {own} {modality}".rstrip() + f", not {role!r}; it refuses")
        return Workspace(self._workspaces, run, role)

    def ledger(self, run: str, role: str) -> Ledger:
        """What a teacher of this node gave away in a run."""
        budget = self.node_config.get("score-budget", 0)
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
            raise ConfigError(f"node-config: score-budget is {budget!r}; a whole number of margins is needed, 0 for no limit")
        return Ledger(self._home / "answers" / role.replace("/", "-"), run, budget)

    @property
    def _home(self) -> Path:
        return home(self.config, self.node_config)

    @property
    def _workspaces(self) -> Path:
        return self._home / "workspace"

    def fit(self, run: str, role: str, share: tuple[int, int] = (0, 1), *, exact: bool = True) -> tuple[Fit, dict[str, Any]]:
        """A role's model in the state it was last saved in (fresh where none was), and the values saved beside it.

        It is taken out of the memory of this process: whoever is interrupted while he works on it must not leave it there half trained.
        :meth:`save` and :meth:`keep` put it back.

        Args:
            run, role: whose.
            share: (w, W) of a student worker.
            exact: the parameters matter; otherwise the caller puts others in anyhow.
        """
        workspace = self.workspace(run, role)
        cached = _FITS.pop(workspace.path, None)
        if cached and cached.state_id == workspace.state_id() and (cached.exact or not exact):
            return cached.fit, cached.state
        return self.saved(run, role, share)

    def saved(self, run: str, role: str, share: tuple[int, int] = (0, 1), *, previous: bool = False) -> tuple[Fit, dict[str, Any]]:
        """A role's model as it lies on disk (or the one before it), and the values saved beside it; fresh where nothing does.

        A file that is damaged is set aside: going on without it is what a node with an empty disk would do.
        """
        workspace, fit = self.workspace(run, role), self.fresh(role, share)
        if not (workspace.previous if previous else workspace.path).is_file():
            return fit, {}
        try:
            return fit, workspace.load(fit, previous=previous)
        except DataError as error:
            write(f"!! {error}; it is set aside as {workspace.set_aside(previous=previous).name}, and {role} goes on as if it had been lost")
            return self.fresh(role, share), {}  # the other one may be half restored

    def fresh(self, role: str, share: tuple[int, int] = (0, 1)) -> Fit:
        """A role's model before its first epoch."""
        distilled = role.startswith("student/") and self.config.distillation.enabled
        name = role.partition("/")[0] if role.startswith("student/") else role  # all workers start from the same student
        dataset, cache = self.dataset(role), self._home / "cache"
        return build_fit(self.config, build_trainer(self.config, dataset, name, distilled=distilled, device=self.device, share=share, cache=cache))

    def save(self, run: str, role: str, fit: Fit, *, keep_previous: bool = False, **values: Any) -> None:
        """Save a role's model, and remember it for as long as this process and the file live."""
        workspace = self.workspace(run, role)
        state_id = workspace.save(fit, keep_previous=keep_previous, **values)
        for path in [path for path in _FITS if run not in path.parts]:
            del _FITS[path]  # earlier runs in a process that outlives them
        _FITS[workspace.path] = _Cached(state_id, fit, {"epoch": fit.epoch, **values}, exact=True)

    def keep(self, run: str, role: str, fit: Fit, state: dict[str, Any]) -> None:
        """Remember a model whose parameters are others than those saved."""
        workspace = self.workspace(run, role)
        _FITS[workspace.path] = _Cached(workspace.state_id(), fit, state, exact=False)

    def forget(self, run: str) -> None:
        """Delete the models of all roles in a run."""
        for path in [path for path in _FITS if run in path.parts]:
            del _FITS[path]
        delete_states(self._workspaces, run)

    def _dataset(self, modalities: tuple[str, ...] | None, at_least: int) -> Dataset:
        path, standin = locate(self.config, self.node_config)
        return _load(path, shown_name(self.config, standin), modalities, at_least, standin, _stamp(path))


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a dataset's files: a changed file is read and checked again."""
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir()) if file.is_file())


@lru_cache(maxsize=4)
def _load(path: Path, name: str, modalities: tuple[str, ...] | None, at_least: int, standin: bool, stamp: object) -> Dataset:
    return load_dataset(path, name=name, modalities=modalities, at_least=at_least, standin=standin)
