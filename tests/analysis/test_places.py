"""The paths that commands are given: homes, runs, folders to write to. What cannot be used is refused in one line, before anything is done."""

import json

import numpy as np
import pytest

from ckd_fed.analysis.locate import list_runs, runs_directory
from ckd_fed.cli import main
from ckd_fed.commands.places import home_given
from ckd_fed.config import Config, resolve
from ckd_fed.data.locate import locate
from ckd_fed.errors import ConfigError, DataError
from ckd_fed.files import expanded
from ckd_fed.home import home
from ckd_fed.verify import verify

NOBODY = "~no-such-user/x"


@pytest.fixture
def said(capsys):
    """Run a command that is refused, in one line and without any other output, and return the line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        assert ended.value.code == 1
        out, error = capsys.readouterr()
        assert error.startswith("ckd-fed: ")
        assert error.count("\n") == 1
        assert out == ""
        return error

    return run


@pytest.mark.parametrize(("arguments", "what"), [
    (["runs", "--home", NOBODY], "--home"),
    (["report", NOBODY], "RUN"),
    (["compare", NOBODY, "one"], "RUN"),
    (["compare", "one", "two", "--plot", f"{NOBODY}.png"], "--plot"),
    (["data", "inspect", NOBODY], "the dataset"),
    (["data", "inspect", "toy", "--home", NOBODY], "--home"),
    (["data", "inspect", "toy", "--plot", NOBODY], "--plot"),
    (["data", "import", NOBODY, "--as", "x"], "PATH"),
    (["data", "import", "x.csv", "--features", f"image={NOBODY}", "--as", "x"], "--features image"),
    (["data", "split-by-modality", "toy", NOBODY], "DIR"),
    (["data", "prepare", "baby", "--from", NOBODY], "--from"),
    (["data", "prepare", "baby", "--text-vectors", NOBODY], "--text-vectors"),
    (["data", "fetch", "baby", "--to", NOBODY], "--to"),
    (["cluster", "init", NOBODY, "--host", "h", "--teachers", "image"], "DIR"),
    (["cluster", "move", NOBODY, "--host", "h"], "DIR"),
    (["doctor", NOBODY], "NODE"),
    (["doctor", "--connection", "lab", "--cluster", NOBODY], "--cluster"),
])  # fmt: skip
def test_the_folder_of_a_user_that_there_is_none_of(arguments, what, said, tmp_path, monkeypatch):
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    message = said(*arguments)
    assert f"{what} is '{NOBODY}" in message
    assert "no folder for ~no-such-user" in message


def test_it_is_refused_in_keys_and_in_the_environment_too(refuses, monkeypatch, said):
    refuses(ConfigError, lambda: home(Config(home=NOBODY)), f"home is '{NOBODY}'")
    refuses(ConfigError, lambda: locate(resolve({"data.dir": NOBODY})), f"the dataset folder is '{NOBODY}'")
    monkeypatch.setenv("CKD_FED_HOME", NOBODY)
    refuses(ConfigError, runs_directory, f"home is '{NOBODY}'")
    assert f"home is '{NOBODY}'" in said("runs")


def test_a_users_own_folder_is_expanded_and_nothing_is_no_path(refuses, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CKD_FED_HOME", raising=False)
    assert expanded("~/x", "DIR") == tmp_path / "x"
    assert runs_directory() == tmp_path / ".ckd_fed" / "runs"
    refuses(ConfigError, lambda: expanded("", "DIR"), "DIR is ''")


def test_a_home_that_training_refuses_is_refused_for_runs_too(said, tmp_path, monkeypatch):
    """An empty table would say that there are no runs."""
    file = tmp_path / "file"
    file.write_text("x")
    monkeypatch.setenv("CKD_FED_HOME", "rel")
    assert "home is 'rel'; an absolute path is needed" in said("runs")
    for place in (file, file / "below"):
        monkeypatch.setenv("CKD_FED_HOME", str(place))
        assert f"home is '{place}', but {file} is no folder" in said("runs")
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    assert f"--home is '{file}', but {file} is no folder" in said("runs", "--home", file)
    assert f"home is '{file}', but {file} is no folder" in said("data", "import", file, "--as", "x", "--home", file)
    assert file.read_text() == "x"


def test_runs_of_another_home(runs, tmp_path, capsys, monkeypatch):
    """The home may be named to every command that looks for runs; it is where their data are, too."""
    runs("one", "two")
    (tmp_path / "runs" / "one" / "test_users.npz").unlink()  # so that comparing needs the data
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path.parent)
    capsys.readouterr()
    for given in (str(tmp_path), tmp_path.name):
        main(["runs", "--home", given])
        assert {"one", "two"} <= set(capsys.readouterr().out.replace("│", " ").split())
    main(["compare", "one", "two", "--home", str(tmp_path)])
    main(["report", "one", "--home", str(tmp_path), "--output", str(tmp_path / "new" / "report")])
    assert (tmp_path / "new" / "report" / "report.html").is_file()
    capsys.readouterr()
    main(["recommend", "one", "--user", "4", "--k", "3", "--json", "--home", str(tmp_path)])
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3
    main(["export", "one", "--home", str(tmp_path)])
    assert (tmp_path / "runs" / "one" / "export" / "items.json").is_file()
    main(["runs"])
    assert "one" not in capsys.readouterr().out.split()
    with home_given(""):
        assert runs_directory() == tmp_path / "elsewhere" / "runs"


def test_the_environment_is_as_it_was_afterwards(tmp_path, monkeypatch):
    monkeypatch.delenv("CKD_FED_HOME", raising=False)
    places = []

    def refused():
        with home_given(str(tmp_path)):
            places.append(runs_directory())
            raise DataError("x")

    with pytest.raises(DataError):
        refused()
    assert places == [tmp_path / "runs"]
    assert runs_directory() != tmp_path / "runs"


def test_a_folder_in_the_place_of_the_record_is_no_run(tmp_path, monkeypatch, said, capsys):
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    (tmp_path / "runs" / "dd" / "metrics.jsonl").mkdir(parents=True)
    assert list_runs(tmp_path / "runs") == []
    main(["runs"])
    assert "dd" not in capsys.readouterr().out.replace("│", " ").split()
    message = said("report", "dd")
    assert "unknown run 'dd'" in message
    assert "did you mean" not in message


def test_a_folder_to_write_to_that_is_a_file(runs, tmp_path, said, capsys):
    runs("one")
    file = tmp_path / "file"
    file.write_text("x")
    capsys.readouterr()
    for command in ("export", "report"):
        for place in (file, file / "below"):
            assert f"--output is '{place}', but {file} is no folder; a folder is needed" in said(command, "one", "--output", place)
        assert f"--output is '{NOBODY}'" in said(command, "one", "--output", NOBODY)
    assert file.read_text() == "x"


def test_a_plot_that_cannot_be_written_is_told_before_anything_is_printed(runs, tmp_path, said, capsys):
    runs("one", "two")
    file, folder = tmp_path / "file", tmp_path / "folder.png"
    file.write_text("x")
    folder.mkdir()
    capsys.readouterr()
    for name in ("x.gif", "x", "x.png.svg"):
        message = said("compare", "one", "two", "--plot", tmp_path / name)
        assert str(tmp_path / name) in message
        assert "ends in .png" in message
        assert not (tmp_path / name).exists()
    assert f"--plot is '{folder}', which is a folder" in said("compare", "one", "two", "--plot", folder)
    assert f"{file} is no folder" in said("compare", "one", "two", "--plot", file / "x.png")
    main(["compare", "one", "two", "--plot", str(tmp_path / "x.PNG")])
    assert (tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_dataset_or_folder_without_a_name(tmp_path, write_dataset, monkeypatch, said):
    (tmp_path / "data").mkdir()
    write_dataset("data/toy")
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert "unknown dataset ''" in said("data", "inspect", "")
    assert "unknown dataset ''" in said("data", "transform", "", "image=center", "--as", "x")
    assert "PATH is ''" in said("data", "import", "", "--as", "x")
    message = said("data", "split-by-modality", "toy", "")
    assert "DIR is ''" in message
    assert "remove" not in message
    assert "DIR is ''" in said("cluster", "init", "", "--host", "h", "--teachers", "image")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_no_reference_file(tmp_path, refuses, said):
    assert "does not exist" not in refuses(DataError, lambda: verify(tmp_path), tmp_path, "is a folder")
    assert "is a folder" in said("verify", tmp_path)
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    refuses(DataError, lambda: verify(tmp_path / "x.npz"), "not a reference file")
