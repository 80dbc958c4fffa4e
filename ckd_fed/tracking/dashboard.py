"""The W&B workspace as code: which panels show the imbalance, and how they are made in a user's project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ckd_fed.errors import CkdError, ConfigError
from ckd_fed.tracking.wandb_mirror import has_key

NAME = "ckd_fed: modality balance"


@dataclass(frozen=True)
class Panel:
    """One panel: lines over rounds, or bars of what runs ended with (``kind`` "line" or "bar")."""

    title: str
    metrics: tuple[str, ...]
    kind: str = "line"


@dataclass(frozen=True)
class Section:
    """A section of the workspace."""

    title: str
    panels: tuple[Panel, ...]


def sections(modalities: Sequence[str]) -> list[Section]:
    """The workspace for runs of some modalities; every metric is one that the server logs."""

    def each(pattern: str) -> tuple[str, ...]:
        return tuple(pattern.format(m) for m in modalities)

    tested = ("final/student/test/recall@20", "final/plain/test/recall@20", *each("final/teacher/{}/test/recall@20"))
    return [
        Section(
            "Imbalance over rounds",
            (
                Panel("Share of its teacher's recall that each modality has reached", each("reached/{}")),
                Panel("Causal effect, share", each("effect_share/{}")),
                Panel("Causal effect, mean", each("effect/{}")),
                Panel("Weight of its teacher, mean", each("weight/{}")),
            ),
        ),
        Section(
            "Teachers against student",
            (
                *(Panel(f"{m}: its teacher, and the student's {m} view", (f"teacher/{m}/recall@20", f"only/{m}/recall@20")) for m in modalities),
                Panel("Teachers learning, Recall@20 on validation", each("teacher/{}/val/recall@20")),
            ),
        ),
        Section(
            "Distillation",
            (
                Panel("Losses of the student", ("loss/total", "loss/bpr", "loss/kd")),
                Panel("Specific loss", each("specific/{}")),
                Panel("Generic loss", each("generic/{}")),
            ),
        ),
        Section(
            "Federation health",
            (
                Panel("Seconds of a round", ("seconds",)),
                Panel("Seconds until each node's answer", ("seconds/distil/student/0", *each("seconds/score/teacher/{}"))),
                Panel("Bytes of a round", ("bytes", "bytes/margins")),
            ),
        ),
        Section(
            "Quality",
            (
                Panel("Recall@20 on validation", ("val/recall@20", "plain/val/recall@20")),
                Panel("NDCG@20 (standard) on validation", ("val/ndcg@20",)),
                Panel("Recall@20 on test", tested, "bar"),
            ),
        ),
    ]


def outline(wanted: Sequence[Section]) -> str:
    """The sections as text, a line for each panel."""
    lines = [NAME]
    for section in wanted:
        lines.append(f"  {section.title}")
        lines += [f"    [{panel.kind}] {panel.title}: {', '.join(panel.metrics)}" for panel in section.panels]
    return "\n".join(lines)


def build_workspace(wanted: Sequence[Section], entity: str, project: str) -> Any:
    """The workspace of package wandb-workspaces, not saved yet.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        panels, workspaces = import_module("wandb_workspaces.reports.v2"), import_module("wandb_workspaces.workspaces")
    except ImportError:
        raise ConfigError("the dashboard needs the package wandb-workspaces; install it with: pip install 'ckd_fed[dashboard]'") from None

    def made(panel: Panel) -> Any:
        if panel.kind == "bar":
            return panels.BarPlot(title=panel.title, metrics=list(panel.metrics))
        return panels.LinePlot(title=panel.title, x="round", y=list(panel.metrics))

    parts = [workspaces.Section(name=section.title, panels=[made(panel) for panel in section.panels], is_open=True) for section in wanted]
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=parts)


def create(wanted: Sequence[Section], entity: str, project: str) -> str:
    """Create the workspace in a W&B project and return its address.

    Raises:
        ConfigError: no key, or the package is not installed.
        CkdError: W&B did not take it.
    """
    import wandb

    if not has_key():
        raise ConfigError("no W&B key on this machine, so nothing can be created; set WANDB_API_KEY or use `wandb login`, or look at --dry-run")
    try:
        workspace = build_workspace(wanted, entity or str(wandb.Api(timeout=20).default_entity or ""), project)
        workspace.save()
        return str(workspace.url)
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CkdError(f"W&B did not take the workspace for project {project!r}: {type(error).__name__}: {reason}") from None
