"""Silos: each node has what it may have, byte for byte, and nothing else."""

import json

import numpy as np
import pytest

from ckd_fed.cli import main
from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.draft import write_draft
from ckd_fed.data.importers.detect import read_draft
from ckd_fed.data.silos import split_by_modality
from ckd_fed.errors import DataError

SPLIT = ["test.json", "train.json", "val.json"]


@pytest.fixture
def source(write_dataset, tmp_path):
    directory = write_dataset(n_modalities=3)
    np.save(directory / "text_mask.npy", np.arange(30) % 4 > 0)
    write_draft(read_draft([directory]), tmp_path / "made")
    return tmp_path / "made"


def test_each_node_has_what_it_may_have(source, tmp_path):
    silos = tmp_path / "silos"
    written = split_by_modality(source, silos)
    assert written == {
        "student": sorted([*SPLIT, "audio_feat.npy", "image_feat.npy", "text_feat.npy", "text_mask.npy", "users.json", "items.json"]),
        "teacher-audio": sorted([*SPLIT, "audio_feat.npy"]),
        "teacher-image": sorted([*SPLIT, "image_feat.npy"]),
        "teacher-text": sorted([*SPLIT, "text_feat.npy", "text_mask.npy"]),
    }
    for folder, names in written.items():
        assert {path.name for path in (silos / folder).iterdir()} == {*names, "manifest.json"}
        assert all((silos / folder / name).read_bytes() == (source / name).read_bytes() for name in names)
        assert load_dataset(silos / folder, at_least=1).fingerprint == load_dataset(source).fingerprint
    said = (silos / "teacher-text" / "manifest.json").read_text()
    assert "image" not in said
    assert "audio" not in said
    whole = json.loads((source / "manifest.json").read_text())
    assert json.loads((silos / "student" / "manifest.json").read_text()) == whole
    assert json.loads(said)["modalities"] == {"text": whole["modalities"]["text"]}


def test_a_silo_is_checked_like_any_dataset(source, tmp_path, refuses):
    split_by_modality(source, tmp_path / "silos")
    path = tmp_path / "silos" / "teacher-image" / "image_feat.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refuses(DataError, lambda: load_dataset(path.parent, at_least=1), path, "changed")


def test_a_dataset_without_a_manifest_has_silos_without(write_dataset, tmp_path):
    split_by_modality(write_dataset(), tmp_path / "silos")
    assert not list((tmp_path / "silos").rglob("manifest.json"))


def test_nothing_is_overwritten_or_left_half(source, tmp_path, refuses):
    (tmp_path / "silos").mkdir()
    refuses(DataError, lambda: split_by_modality(source, tmp_path / "silos"), tmp_path / "silos", "exists")
    refuses(DataError, lambda: split_by_modality(source, source / "silos"), "within the dataset")
    (source / "train.json").write_text("{}")
    refuses(DataError, lambda: split_by_modality(source, tmp_path / "other"), source / "train.json")
    assert not (tmp_path / "other").exists()


def test_the_command(source, tmp_path, capsys):
    main(["data", "split-by-modality", str(source), str(tmp_path / "silos")])
    out = capsys.readouterr().out
    assert f"{tmp_path / 'silos' / 'teacher-text'}: test.json, text_feat.npy, text_mask.npy, train.json, val.json" in out
    assert 'role="teacher" modality="audio" data-dir=' in out
