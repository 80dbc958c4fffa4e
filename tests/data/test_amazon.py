"""The Amazon pipeline on made-up files of the true formats, end to end, against what was put into them."""

import gzip
import json
import sys

import numpy as np
import pytest

from benchmarks.amazon import write_files
from ckd_fed.cli import main
from ckd_fed.data.amazon import item_text, read_images, read_reviews, read_texts
from ckd_fed.data.dataset import load_dataset
from ckd_fed.errors import DataError

ITEMS = 60


@pytest.fixture
def files(tmp_path):
    """Made-up files, and all ASINs."""
    directory = tmp_path / "amazon"
    directory.mkdir()
    asins = write_files(directory, users=80, items=ITEMS, degree=6, products=150, images=120)
    return directory, asins


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """A module with an encoder: number of characters, of blanks and the code of the first character."""
    (tmp_path / "tiny_encoder.py").write_text(
        "import numpy as np\ndef encode(texts):\n    return np.array([[len(t), t.count(' '), ord(t[0])] for t in texts], dtype=np.float32)\n"
        "def short(texts):\n    return np.ones((1, 3), dtype=np.float32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as where the extra is not installed
    return "tiny_encoder:encode"


def lines(path):
    return gzip.open(path, "rt").read().splitlines()


def rewrite(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(row + "\n" for row in rows)


def run(directory, home, *more):
    main(["data", "prepare", "baby", "--from", str(directory), "--home", str(home), *more])


def test_end_to_end(files, encoder, tmp_path, capsys):
    directory, asins = files
    run(directory, tmp_path / "home", "--encoder", encoder)
    out = capsys.readouterr().out
    dataset = load_dataset(tmp_path / "home" / "data" / "baby")
    assert (dataset.n_users, dataset.n_items) == (80, ITEMS)
    assert [len(getattr(dataset, split)) for split in ("train", "val", "test")] == [320, 80, 80]
    assert "train 320, val 80, test 80" in out
    assert not dataset.masks
    items = json.loads((dataset.directory / "items.json").read_text())
    users = json.loads((dataset.directory / "users.json").read_text())
    assert items == sorted(asins[:ITEMS])
    reviewed = {(record["reviewerID"], record["asin"]) for record in map(json.loads, lines(directory / "reviews_Baby_5.json.gz"))}
    held = {(users[u], items[i]) for split in (dataset.train, dataset.val, dataset.test) for u, i in zip(split.row, split.items, strict=True)}
    assert held == reviewed
    content = (directory / "image_features_Baby.b").read_bytes()
    for start in range(0, len(content), 16_394):
        asin = content[start : start + 10].decode()
        if asin in items:
            np.testing.assert_array_equal(
                dataset.features["image"][items.index(asin)], np.frombuffer(content[start + 10 : start + 16_394], dtype="<f4")
            )
    for record in map(eval, lines(directory / "meta_Baby.json.gz")):  # the test's own files
        if record["asin"] in items:
            text = f"{record['title']} {record['brand']} Baby {record['categories'][0][1]} {record['description']}"
            assert dataset.features["text"][items.index(record["asin"])].tolist() == [len(text), text.count(" "), ord(text[0])]
    manifest = json.loads((dataset.directory / "manifest.json").read_text())
    assert manifest["modalities"]["text"]["encoder"] == encoder
    assert [source["name"] for source in manifest["sources"]] == ["reviews_Baby_5.json.gz", "image_features_Baby.b", "meta_Baby.json.gz"]
    assert manifest["split"]["rule"] == "random"
    assert manifest["split"]["seed"] == 123


def test_precomputed_vectors_and_items_without_image_or_text(files, tmp_path, capsys):
    directory, asins = files
    ids = sorted(asins[:ITEMS])
    np.savez(tmp_path / "text.npz", ids=ids[5:], features=np.arange((ITEMS - 5) * 4, dtype=np.float32).reshape(-1, 4))
    path = directory / "image_features_Baby.b"
    records = [path.read_bytes()[start : start + 16_394] for start in range(0, path.stat().st_size, 16_394)]
    path.write_bytes(b"".join(record for record in records if record[:10].decode() not in ids[-3:]))
    run(directory, tmp_path / "home", "--text-vectors", str(tmp_path / "text.npz"), "--encoder", "clip", "--as", "mine", "--dtype", "float16")
    out = capsys.readouterr().out
    dataset = load_dataset(tmp_path / "home" / "data" / "mine")
    np.testing.assert_array_equal(dataset.masks["image"], np.arange(ITEMS) < ITEMS - 3)
    np.testing.assert_array_equal(dataset.masks["text"], np.arange(ITEMS) >= 5)
    assert "3 of 60 items have no image" in out
    assert json.loads((dataset.directory / "manifest.json").read_text())["modalities"]["text"]["encoder"] == "clip"
    assert dataset.features["image"].dtype == np.float16
    run(directory, tmp_path / "home", "--text-vectors", str(tmp_path / "text.npz"), "--as", "mine", "--replace")  # the default encoder made none
    assert json.loads((dataset.directory / "manifest.json").read_text())["modalities"]["text"]["encoder"] == "not stated"


def test_an_item_without_any_text_is_masked(files, encoder, tmp_path):
    directory, asins = files
    path = directory / "meta_Baby.json.gz"
    rows = [eval(row) for row in lines(path)]
    empty, absent = asins[2], asins[3]
    kept = [{"asin": empty, "categories": [[]]} if row["asin"] == empty else row for row in rows if row["asin"] != absent]
    rewrite(path, map(repr, kept))
    run(directory, tmp_path / "home", "--encoder", encoder)
    dataset = load_dataset(tmp_path / "home" / "data" / "baby")
    items = json.loads((dataset.directory / "items.json").read_text())
    assert sorted(items[k] for k in np.flatnonzero(~dataset.masks["text"])) == sorted([empty, absent])


def test_text_of_an_item(tmp_path, refuses):
    record = {"title": "A  B\n", "brand": "C", "categories": [["D", "E"], ["F"]], "description": ["G", "H"], "price": 3}
    assert item_text(tmp_path, 1, record) == "A B C D E F G H"
    assert item_text(tmp_path, 1, {}) == ""
    refuses(DataError, lambda: item_text(tmp_path, 7, {"title": 5}), "line 7", "title is 5")


def test_json_and_python_literals_are_the_same(files):
    directory, asins = files
    path = directory / "meta_Baby.json.gz"
    before = read_texts(path, asins[:ITEMS])
    rewrite(path, [json.dumps(eval(row)) for row in lines(path)])
    assert read_texts(path, asins[:ITEMS]) == before
    assert len(before) == ITEMS


def test_a_line_is_never_evaluated(files, tmp_path, refuses):
    directory, asins = files
    path, witness = directory / "meta_Baby.json.gz", tmp_path / "witness"
    rewrite(path, [f"{{'asin': '{asins[0]}', 'title': open({str(witness)!r}, 'w').name}}"])
    refuses(DataError, lambda: read_texts(path, asins[:ITEMS]), path, "line 1")
    assert not witness.exists()


def test_of_several_reviews_the_earliest_counts(files):
    path = files[0] / "reviews_Baby_5.json.gz"
    before = read_reviews(path)
    rows = lines(path)
    again = json.loads(rows[3])
    rewrite(path, [*rows, json.dumps({**again, "unixReviewTime": 5})])
    after = read_reviews(path)
    assert after.doubled == 1
    assert after.times[3] == 5
    assert (after.users, after.items) == (before.users, before.items)


@pytest.mark.parametrize(("arguments", "mentions"), [
    ([], ["'sentence-transformers/all-MiniLM-L6-v2'", "pip install 'ckd_fed[encode]'", "--text-vectors"]),
    (["--encoder", "tiny_encoder:nothing"], ["'tiny_encoder:nothing'"]),
    (["--encoder", "tiny_encoder:short"], ["60 finite rows"]),
    (["--encoder", "some/model"], ["pip install 'ckd_fed[encode]'"]),
    (["--split", "leave-one-in", "--encoder", "tiny_encoder:encode"], ["leave-one-out"]),
    (["--seed", "-3"], ["--seed is -3"]),
    (["--as", "a/b"], ["plain name"]),
    (["--text-vectors", "nowhere.npz"], ["nowhere.npz does not exist"]),
])  # fmt: skip
def test_what_the_command_refuses(files, encoder, tmp_path, capsys, arguments, mentions):
    if "pip install 'ckd_fed[encode]'" in mentions:
        try:
            import sentence_transformers  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            pytest.skip("sentence-transformers is installed")
    with pytest.raises(SystemExit):
        run(files[0], tmp_path / "home", *arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not [mention for mention in mentions if mention not in error], error
    assert not list((tmp_path / "home").rglob("*"))


def test_files_that_are_not_there(files, tmp_path, encoder, capsys):
    (files[0] / "image_features_Baby.b").unlink()
    run(files[0], tmp_path / "home", "--encoder", encoder)
    out = capsys.readouterr().out
    assert "no image modality" in out
    assert "this dataset serves a teacher" in out
    (files[0] / "meta_Baby.json.gz").unlink()
    with pytest.raises(SystemExit):
        run(files[0], tmp_path / "other", "--encoder", encoder)
    assert "meta_Baby.json.gz does not exist" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened(files, refuses):
    path = files[0] / "reviews_Baby_5.json.gz"
    path.unlink()
    path.mkdir()
    refuses(DataError, lambda: read_reviews(path), path, "after line 0")


def test_images_out_of_step_or_twice(files, refuses):
    directory, asins = files
    path, ids = directory / "image_features_Baby.b", sorted(asins[:ITEMS])
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    refuses(DataError, lambda: read_images(path, ids), path, "no multiple of the 16,394")
    path.write_bytes(content[:16_394] + b"\0" * 4 + content[16_394:-4])
    refuses(DataError, lambda: read_images(path, ids), path, "record 2", "no ASIN")
    first = next(k for k in range(120) if content[k * 16_394 :][:10].decode() in ids) * 16_394
    path.write_bytes(content + content[first : first + 16_394])
    assert read_images(path, ids)[1].all()
    path.write_bytes(content + content[first : first + 10] + bytes(16_384))
    refuses(DataError, lambda: read_images(path, ids), path, "record 121", "twice")
