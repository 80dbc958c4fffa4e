"""The ``ckd-fed`` command's own checks, and its reference of the configuration's keys."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ckd_fed.backbones import BACKBONES
from ckd_fed.cli import main
from ckd_fed.commands.keys import keys_markdown, keys_text
from ckd_fed.config import resolve

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "configuration.md"
BABY = str(ROOT / "simulations" / "baby")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, write_dataset):
    """A home with the dataset ``toy``."""
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write_dataset("data/toy")
    return tmp_path


@pytest.fixture
def refused(capsys):
    """Assert that a command is refused in one line, and return that."""

    def check(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (1, "")
        assert len(err.splitlines()) == 1
        return err

    return check


@pytest.mark.parametrize("command", [["config"], ["train"], ["run", BABY]])
def test_an_unknown_option_is_refused_before_anything_is_created(refused, home, command):
    said = refused(*command, "-c", "dataset=toy backbone=freedom model.neighbors=3")
    assert "unknown option of backbone freedom 'neighbors'; did you mean 'neighbours'?" in said
    said = refused(*command, "-c", "dataset=toy backbone=freedom model.edge-dropout=much")
    assert "model.edge-dropout is 'much'" in said
    assert sorted(path.name for path in home.iterdir()) == ["data"]


def test_an_option_that_the_app_does_not_name(refused, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\ndataset = 'toy'\nbackbone = ''\n")
    assert "model.n-layers, and Flower takes no key that the app does not name" in refused(
        "run", str(tmp_path), "-c", "backbone=bm3 model.n_layers=2"
    )
    assert "-c sets model.layers" in refused("run", str(tmp_path), "-c", "backbone=no_such_module:Model model.layers=2")


def test_a_backbone_that_is_on_the_nodes_only(capsys):
    main(["config", "-c", "dataset=toy backbone=no_such_module:Model model.layers=2"])
    assert yaml.safe_load(capsys.readouterr().out)["model"] == {"layers": 2}


def test_a_run_to_go_on_with_has_its_own_options(capsys):
    main(["config", "-c", "dataset=toy resume=mine model.neighbours=2"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["neighbours"] == 2


def test_all_keys_are_explained(capsys):
    main(["config", "--keys"])
    shown = capsys.readouterr().out
    assert shown == keys_text()
    assert max(map(len, shown.splitlines())) <= 100
    words = shown.split()
    for key in [key for name in BACKBONES for key in resolve({"backbone": name}).flat()]:
        assert key in words
    assert [line for line in shown.splitlines() if "training.learning-rate  " in line] == [
        "  training.learning-rate     0.0005   Learning rate of Adam. (number, above 0)"
    ]
    assert "`" not in shown


def test_the_reference_is_up_to_date(capsys):
    main(["config", "--keys", "--markdown"])
    shown = capsys.readouterr().out
    assert shown == keys_markdown()
    assert shown == REFERENCE.read_text(), f"write it again: ckd-fed config --keys --markdown > {REFERENCE.relative_to(ROOT)}"
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 5 for line in rows)


def test_help_is_quick():
    """It imports nothing that takes long."""
    code = "import sys\nfrom ckd_fed.cli import main\ntry: main(['config', '--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--keys" in done.stdout


def test_a_device_that_is_not_there_is_told_before_a_run_takes_the_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["train", "-c", "name=v9 training.device=cuda:90 tracking.wandb=off"])
    assert "this machine shows" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
