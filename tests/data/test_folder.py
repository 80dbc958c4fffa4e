"""A folder appears whole or not at all, and the one that it replaces is not lost."""

import os

import pytest

from ckd_fed.data.folder import whole_folder
from ckd_fed.errors import DataError


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_it_appears_once_it_is_whole(tmp_path, refuses):
    with whole_folder(tmp_path / "a") as fresh:
        (fresh / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert content(tmp_path) == {"a/x": "1"}
    refuses(DataError, lambda: whole_folder(tmp_path / "a").__enter__(), tmp_path / "a", "exists")
    with whole_folder(tmp_path / "a", replace=True) as fresh:
        (fresh / "y").write_text("2")
    assert content(tmp_path) == {"a/y": "2"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["block", "first rename", "second rename"])
def test_whatever_ends_it_the_old_folder_is_kept(error, at, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("1")
    renames, real = [], os.rename

    def rename(source, target):
        renames.append(target)
        if at.split()[0] == {1: "first", 2: "second"}.get(len(renames)):
            raise error
        real(source, target)

    def replace():
        with whole_folder(tmp_path / "a", replace=True) as fresh:
            (fresh / "y").write_text("2")
            if at == "block":
                raise error

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(error):
        replace()
    assert content(tmp_path) == {"a/x": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
