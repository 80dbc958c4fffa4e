"""Checkpoints: complete, atomic, and without pickle."""

import os
import stat

import numpy as np
import pytest

from ckd_fed.checkpoint import load_checkpoint, load_state, save_checkpoint
from ckd_fed.errors import DataError

ARRAYS = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.float32(7) * np.ones(()), "half": np.ones(3, dtype=np.float16)}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    save_checkpoint(path, ARRAYS, {"epoch": 3, "rows": [{"x": 0.1}]})
    arrays, state = load_checkpoint(path)
    assert state == load_state(path) == {"epoch": 3, "rows": [{"x": 0.1}]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, ARRAYS, {"epoch": 1})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, ARRAYS, {"epoch": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 8 + b[8:], lambda b: b"", lambda b: b[:8] + b"[" + b[9:]])
def test_a_damaged_file_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, ARRAYS, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"state\.safetensors is damaged") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_state(tmp_path / "none")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_a_file_is_for_the_umask_to_say(mask, mode, tmp_path):
    """Unless it is private: a teacher's parameters, on a machine that it shares."""
    before = os.umask(mask)
    try:
        save_checkpoint(tmp_path / "a.safetensors", {}, {})
        save_checkpoint(tmp_path / "b.safetensors", {}, {}, private=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "b.safetensors").stat().st_mode) == 0o600
