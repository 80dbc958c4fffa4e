"""Loading a dataset as a whole: what is refused, the quirks that are not, and the sets the paper uses."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from ckd_fed.data.dataset import dense_features, load_dataset, modalities_in
from ckd_fed.data.triples import TripleStream
from ckd_fed.errors import CkdError, DataError

REAL = Path(__file__).parents[2] / "../shared/data"


def edit(path, change):
    """Change a split file through its parsed form."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_a_valid_dataset(write_dataset):
    directory = write_dataset(n_users=12, n_items=30, n_modalities=3)
    dataset = load_dataset(directory)
    assert (dataset.name, dataset.n_users, dataset.n_items) == ("tiny", 12, 30)
    assert dataset.modalities == ("audio", "image", "text")
    assert not dataset.masks
    assert not dataset.standin
    for split in ("train", "val", "test"):
        table = json.loads((directory / f"{split}.json").read_text())
        part = getattr(dataset, split)
        assert {u: part.items[part.indptr[u] : part.indptr[u + 1]].tolist() for u in range(12)} == {u: sorted(table[str(u)]) for u in range(12)}
    for modality in dataset.modalities:
        np.testing.assert_array_equal(dataset.features[modality], np.load(directory / f"{modality}_feat.npy"))
    assert "12 users, 30 items" in dataset.describe()


def test_only_the_modalities_asked_for_are_opened_in_their_order(write_dataset):
    directory = write_dataset(n_modalities=3)
    (directory / "audio_feat.npy").write_bytes(b"damaged")
    assert load_dataset(directory, modalities=["text", "image"], name="x", standin=True).modalities == ("text", "image")
    assert load_dataset(directory, modalities=["text"], at_least=1).modalities == ("text",)
    assert modalities_in(directory) == ("audio", "image", "text")


@pytest.mark.parametrize("missing", ["train.json", "val.json", "test.json"])
def test_missing_file(write_dataset, refuses, missing):
    directory = write_dataset()
    (directory / missing).unlink()
    refuses(DataError, lambda: load_dataset(directory), directory / missing)


def test_missing_directory(tmp_path, refuses):
    refuses(DataError, lambda: load_dataset(tmp_path / "nowhere"), tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_item_out_of_range_names_user_item_and_limit(write_dataset, refuses, split):
    directory = write_dataset(n_items=30)
    edit(directory / f"{split}.json", lambda table: table["3"].append(30))
    refuses(DataError, lambda: load_dataset(directory), directory / f"{split}.json", "user 3", "item 30", "30 rows")


def test_features_with_too_many_or_different_rows(write_dataset, refuses):
    directory = write_dataset(n_items=30)
    np.save(directory / "text_feat.npy", np.ones((31, 2), dtype=np.float32))
    refuses(DataError, lambda: load_dataset(directory), directory / "text_feat.npy", "31 rows", "30 items")
    np.save(directory / "text_feat.npy", np.ones((29, 2), dtype=np.float32))
    refuses(DataError, lambda: load_dataset(directory), directory / "text_feat.npy", "29 rows", "30 items")


@pytest.mark.parametrize("shape", [(), (30,), (30, 2, 2)])
def test_features_that_are_no_table_are_refused(shape, write_dataset, refuses):
    directory = write_dataset()
    np.save(directory / "text_feat.npy", np.zeros(shape, dtype=np.float32))
    refuses(DataError, lambda: load_dataset(directory), directory / "text_feat.npy", f"has shape {shape}", "(items, dimension)")


@pytest.mark.parametrize("value", ["5", 5.0, True, None, -5])
def test_ids_that_are_no_ids(write_dataset, refuses, value):
    directory = write_dataset()
    edit(directory / "val.json", lambda table: table["2"].append(value))
    refuses(DataError, lambda: load_dataset(directory), directory / "val.json", value)


@pytest.mark.parametrize(("first", "second"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_overlapping_parts(write_dataset, refuses, first, second):
    directory = write_dataset()
    item = json.loads((directory / f"{first}.json").read_text())["4"][0]
    edit(directory / f"{second}.json", lambda table: table["4"].append(item))
    refuses(DataError, lambda: load_dataset(directory), directory, "user 4", f"item {item} ", f"{first}.json and {second}.json")


def test_a_gap_in_the_user_ids(write_dataset, refuses):
    directory = write_dataset(n_users=12)
    for split in ("train", "val", "test"):
        edit(directory / f"{split}.json", lambda table: table.pop("7"))
    refuses(DataError, lambda: load_dataset(directory), directory, "user 7 ", "user 11 ")


def test_a_huge_user_id_is_a_gap(write_dataset, refuses):
    directory = write_dataset(n_users=12)
    edit(directory / "test.json", lambda table: table.update({str(2**39): [1]}))
    refuses(DataError, lambda: load_dataset(directory), directory, "user 12 ", 2**39)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split(write_dataset, refuses, split):
    directory = write_dataset()
    (directory / f"{split}.json").write_text("{}")
    refuses(DataError, lambda: load_dataset(directory), directory / f"{split}.json", "empty")


def test_one_modality_is_too_few_for_a_student(write_dataset, refuses):
    directory = write_dataset(n_modalities=1)
    refuses(DataError, lambda: load_dataset(directory), directory, "image", "at least 2")
    assert load_dataset(directory, at_least=1).modalities == ("image",)


def test_the_same_modality_twice_is_one(write_dataset, refuses):
    directory = write_dataset()
    refuses(DataError, lambda: load_dataset(directory, modalities=["text", "text"]), directory, "at least 2")


def test_no_modality(write_dataset, refuses):
    directory = write_dataset(n_modalities=0)
    refuses(DataError, lambda: load_dataset(directory), directory)
    refuses(DataError, lambda: load_dataset(directory, modalities=["text"], at_least=1), "text")


def test_unknown_modality_lists_the_choices(write_dataset, refuses):
    directory = write_dataset(n_modalities=3)
    refuses(
        DataError, lambda: load_dataset(directory, modalities=["image", "txet"]), directory, "'txet'", "did you mean 'text'", "audio, image, text"
    )


@pytest.mark.parametrize("name", ["", "clip.b32", "type", "keys", "forward", "a b", "weight", "ID"])
def test_any_name_of_a_modality_works_or_is_refused_in_words(write_dataset, name):
    from ckd_fed.backbones import BACKBONES
    from ckd_fed.backbones.build import build_backbone

    directory = write_dataset()
    (directory / "text_feat.npy").rename(directory / f"{name}_feat.npy")
    for backbone in BACKBONES:
        try:
            dataset = load_dataset(directory)
            build_backbone(backbone, dataset.train, dataset.features, {}, seed=0)
        except CkdError as error:
            assert repr(name) in str(error)  # noqa: PT017  # either outcome is right


def test_a_user_who_has_every_item(write_dataset, write_splits, refuses):
    directory = write_dataset(n_users=3, n_items=20)
    write_splits(directory, train={0: [1], 1: range(20), 2: [3]}, val={0: [2]}, test={2: [4]})
    refuses(DataError, lambda: load_dataset(directory), directory, "user 1 ")


def test_a_user_with_all_items_but_one_is_fine(write_dataset, write_splits):
    directory = write_dataset(n_users=3, n_items=20)
    write_splits(directory, train={0: [1], 1: range(19), 2: [3]}, val={0: [19]}, test={2: [4]})
    dataset = load_dataset(directory)
    negatives = np.concatenate([t.ranking[2, t.ranking[0] == 1] for t in TripleStream(dataset.train, "x", 0, 3).epoch(0)])
    assert set(negatives.tolist()) == {19}


def test_bad_mask(write_dataset, refuses):
    directory = write_dataset(n_items=30)
    np.save(directory / "text_mask.npy", np.full(30, 2))
    refuses(DataError, lambda: load_dataset(directory), directory / "text_mask.npy", "first: 2")
    np.save(directory / "text_mask.npy", np.ones(29))
    refuses(DataError, lambda: load_dataset(directory), directory / "text_mask.npy", "(29,)", "(30,)")


def test_quirks_of_real_sets_are_accepted_without_a_warning(write_dataset, write_splits):
    directory = write_dataset(n_users=6, n_items=20)
    write_splits(
        directory,
        train={0: [0, 1], 1: [2], 3: [19]},  # users 2, 4 and 5 are never trained, nor are most items
        val={0: [5], 2: [6]},  # users absent
        test={4: [7], 5: [], 1: []},
    )
    edit(directory / "test.json", lambda table: table.update({"5": [8]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_dataset(directory)
        stream = TripleStream(dataset.train, dataset.fingerprint, 0, 8, 8).epoch(0)
    assert dataset.n_users == 6
    assert dataset.train.users.tolist() == [0, 1, 3]
    assert set(stream[0].ranking[0].tolist()) <= {0, 1, 3}


def test_dense_features_fill_missing_items_with_the_mean_of_the_others(write_dataset):
    directory = write_dataset(n_items=30, dtype=np.float16)
    mask = np.arange(30) % 3 > 0
    np.save(directory / "text_mask.npy", mask.astype(np.int8))
    dataset = load_dataset(directory)
    raw = np.load(directory / "text_feat.npy").astype(np.float32)
    filled = dense_features(dataset, "text")
    assert filled.dtype == np.float32
    np.testing.assert_array_equal(filled[mask], raw[mask])
    np.testing.assert_allclose(filled[~mask], np.broadcast_to(raw[mask].astype(np.float64).mean(0), (10, raw.shape[1])), rtol=1e-6)
    np.testing.assert_allclose(filled.mean(0), raw[mask].mean(0), atol=1e-6)
    np.testing.assert_array_equal(dataset.features["text"], np.load(directory / "text_feat.npy"))
    np.testing.assert_array_equal(dense_features(dataset, "image"), np.load(directory / "image_feat.npy").astype(np.float32))


def test_float64_features_beyond_float32_do_not_turn_infinite(write_dataset):
    directory = write_dataset(n_items=30, dtype=np.float64)
    matrix = np.load(directory / "text_feat.npy")
    matrix[3, 1] = 1e300
    np.save(directory / "text_feat.npy", matrix)
    try:
        filled = dense_features(load_dataset(directory), "text")
    except DataError:
        return
    assert np.isfinite(filled).all()


def test_fingerprint_is_of_the_split_alone(write_dataset, write_splits):
    directory = write_dataset()
    before = load_dataset(directory).fingerprint
    for split in ("train", "val", "test"):  # the order of users and items in a file carries no meaning
        table = json.loads((directory / f"{split}.json").read_text())
        write_splits(directory, **{split: {user: table[user][::-1] for user in reversed(table)}})
    np.save(directory / "text_feat.npy", np.zeros((30, 1), dtype=np.float32))
    assert load_dataset(directory).fingerprint == before

    shutil.copy(directory / "val.json", directory / "spare.json")
    shutil.move(directory / "test.json", directory / "val.json")
    shutil.move(directory / "spare.json", directory / "test.json")
    assert load_dataset(directory).fingerprint != before


def test_fingerprint_is_pinned(write_dataset, write_splits):
    directory = write_dataset(n_users=3, n_items=20)
    write_splits(directory, train={0: [3, 1], 2: [19]}, val={1: [0]}, test={0: [2]})
    dataset = load_dataset(directory)
    assert dataset.fingerprint == "860578f392adc593adb3f18d7cdf4cc69cd32c631dfbcd2827d4723cf7e45f37"
    moved = dataclasses.replace(dataset, val=dataset.test, test=dataset.val)
    assert moved.fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("name", "users", "items", "sizes", "modalities"),
    [
        ("tiktok", 9_308, 6_710, (59_541, 3_051, 6_130), {"audio", "image"}),
        ("baby", 19_445, 7_050, (119_674, 20_559, 20_559), {"image", "text", "title"}),
    ],
)
def test_the_real_sets(name, users, items, sizes, modalities):
    directory = REAL / name
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    dataset = load_dataset(directory)
    assert (dataset.n_users, dataset.n_items) == (users, items)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == sizes
    assert set(dataset.modalities) == modalities
