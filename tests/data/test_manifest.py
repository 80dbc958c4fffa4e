"""The manifest: what it says, and that a changed file is told when the dataset is loaded."""

import json

import numpy as np
import pytest

from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.draft import Draft, ModalityDraft, write_draft
from ckd_fed.data.features import features_fingerprint
from ckd_fed.data.manifest import file_record
from ckd_fed.errors import DataError


def draft(**changes):
    pairs = lambda items: (np.arange(4), np.array(items))  # noqa: E731
    features = {m: ModalityDraft(np.arange(12, dtype=np.float32).reshape(6, 2) + k, source=f"{m}.npz") for k, m in enumerate(("image", "text"))}
    features["text"].mask = np.arange(6) != 2
    features["text"].encoder = "some encoder"
    given = {"parts": {"train": pairs([5, 1, 2, 3]), "val": pairs([0, 0, 0, 0]), "test": pairs([4, 4, 4, 4])}, **changes}
    return Draft("own", list("abcd"), list("uvwxyz"), modalities=features, rule={"rule": "random", "seed": 5}, notes=["something"], **given)


@pytest.fixture
def made(tmp_path):
    write_draft(draft(), tmp_path / "made")
    return tmp_path / "made"


def test_what_it_says(made, tmp_path):
    source = tmp_path / "log.csv"
    source.write_text("content")
    about = write_draft(draft(sources=[source]), tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    assert {key: manifest[key] for key in about} == about
    dataset = load_dataset(tmp_path / "other")
    assert manifest["sources"] == [{"name": "log.csv", "bytes": 7, "sha256": "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"}]
    assert manifest["split"] == {"rule": "random", "seed": 5, "train": 4, "val": 4, "test": 4, "fingerprint": dataset.fingerprint}
    assert manifest["modalities"]["text"] == {
        "dimension": 2, "dtype": "float32", "missing": 1, "source": "text.npz", "encoder": "some encoder",
        "fingerprint": features_fingerprint(dataset.features["text"]),
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "other").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert all(manifest["files"][name] == file_record(tmp_path / "other" / name) for name in names)
    assert str(tmp_path) not in (tmp_path / "other" / "manifest.json").read_text()


@pytest.mark.parametrize(
    "name", ["train.json", "val.json", "test.json", "users.json", "items.json", "image_feat.npy", "text_feat.npy", "text_mask.npy"]
)
def test_a_changed_file(made, refuses, name):
    content = bytearray((made / name).read_bytes())
    content[-2] ^= 1
    (made / name).write_bytes(content)
    refuses(DataError, lambda: load_dataset(made), made / name, "sha256", "restore it", "delete")
    (made / name).write_bytes(bytes(content) + b" ")
    refuses(DataError, lambda: load_dataset(made), made / name, "bytes")
    (made / name).unlink()
    refuses(DataError, lambda: load_dataset(made), made / name)
    (made / "manifest.json").unlink()  # then only the loader's own checks remain
    if name == "text_mask.npy":
        assert not load_dataset(made).masks
    if name == "users.json":
        assert load_dataset(made).user_ids == ["0", "1", "2", "3"]


def test_a_teacher_is_not_stopped_by_another_modalitys_file(made):
    (made / "image_feat.npy").write_bytes(b"changed")
    assert load_dataset(made, modalities=["text"], at_least=1).modalities == ("text",)


def test_what_was_added_later(made, refuses):
    np.save(made / "audio_feat.npy", np.ones((6, 3), dtype=np.float32))
    assert load_dataset(made).modalities == ("audio", "image", "text")
    np.save(made / "image_mask.npy", np.ones(6))
    refuses(DataError, lambda: load_dataset(made), made / "image_mask.npy", "added later", "remove it")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"files": 3, "manifest": 1}', '{"manifest": 1, "files": {"train.json": {}}}', "\udcff", '{"files": {}, "manifest": 2}'],
)
def test_a_damaged_manifest(made, refuses, content):
    (made / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    refuses(DataError, lambda: load_dataset(made), made / "manifest.json")


def test_nothing_is_left_of_a_draft_that_is_no_dataset(tmp_path, refuses):
    gap = {"parts": {split: (np.array([0, 2]), np.array([k, k])) for k, split in enumerate(("train", "val", "test"))}}
    message = refuses(DataError, lambda: write_draft(draft(**gap), tmp_path / "bad"), "user 1")
    assert str(tmp_path) not in message
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_is_replaced_only_if_asked_and_kept_if_the_new_one_fails(made, refuses, tmp_path):
    before = (made / "manifest.json").read_bytes()
    refuses(DataError, lambda: write_draft(draft(), made), made, "--replace")
    gap = {"parts": {split: (np.array([0, 2]), np.array([k, k])) for k, split in enumerate(("train", "val", "test"))}}
    refuses(DataError, lambda: write_draft(draft(**gap), made, replace=True), "user 1")
    assert (made / "manifest.json").read_bytes() == before
    write_draft(draft(), made, dtype="float16", replace=True)
    assert load_dataset(made).features["image"].dtype == np.float16
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_features_beyond_the_dtype_asked_for(tmp_path, refuses):
    one = draft()
    one.modalities["image"].features[3, 1] = 1e6
    refuses(DataError, lambda: write_draft(one, tmp_path / "x", dtype="float16"), "image.npz", "1e+06", "item 3", "float16")
    assert list(tmp_path.iterdir()) == []
