"""The workspace is made of what runs log, and nothing is created without being asked."""

import pytest

from ckd_fed.cli import main
from ckd_fed.errors import CkdError, ConfigError
from ckd_fed.tracking import dashboard

TITLES = ["Imbalance over rounds", "Teachers against student", "Distillation", "Federation health", "Quality"]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_a_dry_run_prints_every_section_and_metric(capsys):
    main(["dashboard", "--dry-run", "--modalities", "image, text,title"])
    shown = capsys.readouterr().out
    places = [shown.index(title) for title in TITLES]
    assert places == sorted(places)
    for m in ("image", "text", "title"):
        for metric in (f"reached/{m}", f"weight/{m}", f"effect_share/{m}", f"only/{m}/recall@20", f"seconds/score/teacher/{m}"):
            assert metric in shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_workspace_has_the_panels_over_rounds():
    pytest.importorskip("wandb_workspaces")
    wanted = dashboard.sections(["image", "text"])
    workspace = dashboard.build_workspace(wanted, "me", "mine")
    assert [section.name for section in workspace.sections] == TITLES
    for section, expected in zip(workspace.sections, wanted, strict=True):
        assert [panel.title for panel in section.panels] == [panel.title for panel in expected.panels]
    plots = [panel for section in workspace.sections for panel in section.panels if type(panel).__name__ == "LinePlot"]
    assert {str(getattr(plot.x, "name", plot.x)) for plot in plots} == {"round"}


def test_without_a_key_or_the_package_one_line_says_so(monkeypatch, refuses, capsys):
    wanted = dashboard.sections(["image", "text"])
    refuses(ConfigError, lambda: dashboard.create(wanted, "", "mine"), "no W&B key", "--dry-run")
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    refuses(ConfigError, lambda: dashboard.build_workspace(wanted, "me", "mine"), "ckd_fed[dashboard]")
    with pytest.raises(SystemExit):
        main(["dashboard", "--modalities", " ,"])
    assert "--modalities" in capsys.readouterr().err


def test_it_is_saved_and_its_address_shown(monkeypatch, capsys, refuses):
    class Workspace:
        url = "https://example.test/workspace"
        saved = 0

        def save(self):
            Workspace.saved += 1

    asked = {}

    def build(wanted, entity, project):
        asked.update(entity=entity, project=project)
        return Workspace()

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(dashboard, "build_workspace", build)
    main(["dashboard", "--entity", "me", "--project", "mine"])
    assert capsys.readouterr().out.strip() == Workspace.url
    assert (asked, Workspace.saved) == ({"entity": "me", "project": "mine"}, 1)

    def refuse(self):
        raise ValueError("permission\ndenied")

    monkeypatch.setattr(Workspace, "save", refuse)
    refuses(CkdError, lambda: dashboard.create([], "me", "mine"), "did not take the workspace", "permission denied", "mine")
