"""Every published layout imported and compared item by item, and what is refused of it."""

import json

import numpy as np
import pytest
from scipy import sparse

from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.draft import write_draft
from ckd_fed.data.importers.detect import read_draft
from ckd_fed.errors import DataError


@pytest.fixture
def bring(tmp_path):
    """Import paths and load the result."""

    def run(*paths, dtype="", **options):
        destination = tmp_path / "home" / "made"
        write_draft(read_draft(list(paths), **options), destination, dtype=dtype, replace=True)
        return load_dataset(destination, at_least=1)

    return run


def test_lattice(lattice, bring, same):
    dataset = bring(lattice)
    same(dataset)
    assert json.loads((dataset.directory / "items.json").read_text())[3] == "B003"
    assert json.loads((dataset.directory / "users.json").read_text())[3] == "A003"
    assert bring(lattice / "5-core").fingerprint == dataset.fingerprint


def test_the_projects_own_layout(bring, same, lattice, tmp_path):
    made = bring(lattice).directory
    again = tmp_path / "again"
    write_draft(read_draft([made]), again)
    same(load_dataset(again))


def test_mmrec(mmrec, bring, same):
    dataset = bring(mmrec)
    same(dataset)
    assert json.loads((dataset.directory / "items.json").read_text())[3] == "B003"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_hkuds(hkuds, bring, same, layout, protocol):
    same(bring(hkuds(layout, protocol)))


def test_hkuds_other_names_and_converted_files(hkuds, matrices, bring, same):
    directory = hkuds(names=("trnMat.pkl", "valMat.pkl", "tstMat.pkl"))
    same(bring(directory))
    (directory / "trnMat.pkl").write_bytes(b"cos\nsystem\n.")
    sparse.save_npz(directory / "trnMat.pkl.npz", matrices["train"].tocsr())  # what the refusal says to run
    same(bring(directory))


def test_layouts_mean_the_same_split(lattice, mmrec, hkuds, bring):
    assert len({bring(directory).fingerprint for directory in (lattice, mmrec, hkuds())}) == 1


def test_float16_on_disk(lattice, bring, same):
    same(bring(lattice, dtype="float16"), np.float16)


def test_float64_becomes_float32(lattice, bring, same, problem):
    np.save(lattice / "image_feat.npy", np.asfortranarray(problem[1]["image"].astype(np.float64)))
    same(bring(lattice))


def test_users_in_no_part_are_renumbered_and_items_at_the_end_left_out(lattice, bring, problem, tmp_path):
    core = lattice / "5-core"
    for split, table in problem[0].items():
        kept = {user: [item for item in row if item != 13] for user, row in table.items() if user != 4}
        (core / f"{split}.json").write_text(json.dumps({**kept, 4: []}))
    dataset = bring(lattice)
    assert (dataset.n_users, dataset.n_items) == (8, 13)
    assert json.loads((dataset.directory / "users.json").read_text()) == [f"A{user:03d}" for user in range(9) if user != 4]
    assert dataset.train.items[dataset.train.indptr[4] : dataset.train.indptr[5]].tolist() == [i for i in problem[0]["train"][5] if i != 13]
    notes = json.loads((dataset.directory / "manifest.json").read_text())["notes"]
    assert any(note.startswith("1 items at the end") for note in notes)
    assert any(note.startswith("1 users are in no part") for note in notes)


def test_a_mask_is_kept(lattice, bring):
    mask = np.arange(14) % 5 > 0
    np.save(lattice / "text_mask.npy", mask.astype(np.int8))
    np.testing.assert_array_equal(bring(lattice).masks["text"], mask)


@pytest.mark.parametrize("rows", [13, 15])
def test_features_with_another_number_of_rows(lattice, mmrec, hkuds, bring, refuses, rows):
    for directory in (lattice, mmrec, hkuds()):
        np.save(directory / "text_feat.npy", np.ones((rows, 2), dtype=np.float32))
        refuses(DataError, lambda directory=directory: bring(directory), "_feat.npy", f"{rows}", "14", "row k")


def test_an_item_beyond_the_features(lattice, bring, refuses):
    path = lattice / "5-core" / "val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "3": [14]}))
    refuses(DataError, lambda: bring(lattice), "val", "user 3", "item 14", "14 rows")


def test_several_splits_are_never_chosen_by_luck(lattice, bring, refuses):
    (lattice / "0-core").mkdir()
    (lattice / "0-core" / "train.json").write_text("{}")
    refuses(DataError, lambda: bring(lattice), "0-core, 5-core")


def test_several_layouts_of_the_same_interactions_are_one_dataset(lattice, mmrec, hkuds, bring, same):
    pickled = hkuds()
    for source in (mmrec / "tiny.inter", *(pickled / name for name in ("train_mat", "val_mat", "test_mat"))):
        (lattice / source.name).write_bytes(source.read_bytes())
    dataset = bring(lattice)
    same(dataset)
    assert json.loads((dataset.directory / "items.json").read_text())[3] == "B003"
    assert "read as lattice" in json.loads((dataset.directory / "manifest.json").read_text())["notes"][0]


def test_several_layouts_that_differ_are_never_chosen_by_luck(lattice, mmrec, bring, refuses, same):
    path = lattice / "tiny.inter"
    text = (mmrec / "tiny.inter").read_text()
    lines = text.splitlines()
    path.write_text("\n".join([lines[0], lines[1].removesuffix("0") + "1", *lines[2:]]) + "\n")
    refuses(DataError, lambda: bring(lattice), "lattice, mmrec", "the train interactions", "differ", "--layout")
    path.write_text(text[: len(text) // 2])
    refuses(DataError, lambda: bring(lattice), "as mmrec it cannot be read", "--layout")
    refuses(DataError, lambda: bring(lattice, features={"audio": lattice / "text_feat.npy"}), "do not apply")
    same(bring(lattice, layout="lattice"))
    path.write_text(text)
    same(bring(lattice, layout="mmrec"))


@pytest.mark.parametrize(("old", "new", "mentions"), [
    ("x_label", "label", ["'x_label'", "userID"]),
    ("\t1\n", "\t3\n", ["x_label is 3", "line "]),
    ("\t1\n", "\tx\n", ["x_label is 'x'", "line "]),
    ("\t5.0\t1393545600\t2", "\t2", ["3 fields, the header has 5"]),
])  # fmt: skip
def test_mmrec_tables_that_are_refused(mmrec, bring, refuses, old, new, mentions):
    path = mmrec / "tiny.inter"
    path.write_text(path.read_text().replace(old, new, 1))
    refuses(DataError, lambda: bring(mmrec), path, *mentions)


def test_an_interaction_twice(mmrec, bring, refuses):
    path = mmrec / "tiny.inter"
    path.write_text(path.read_text() + path.read_text().splitlines()[7] + "\n")
    refuses(DataError, lambda: bring(mmrec), path, "line 74", "twice")


def test_matrices_that_overlap_or_differ_in_shape(hkuds, matrices, bring, refuses):
    import pickle

    directory = hkuds()
    (directory / "val_mat").write_bytes(pickle.dumps((matrices["val"] + matrices["train"]).tocsr()))
    refuses(DataError, lambda: bring(directory), "val", "part before")
    (directory / "val_mat").write_bytes(pickle.dumps(sparse.csr_matrix((9, 15))))
    refuses(DataError, lambda: bring(directory), "different shapes", "(9, 15)")


def test_explicit_zeros_are_no_interactions(hkuds, matrices, bring, same):
    import pickle

    directory = hkuds()
    padded = matrices["train"].tocsr() + matrices["val"].tocsr() * 0
    (directory / "train_mat").write_bytes(pickle.dumps(padded))
    same(bring(directory))


def test_files_of_a_layout_that_is_a_folder(mmrec, refuses, bring):
    refuses(DataError, lambda: bring(mmrec / "tiny.inter", layout="mmrec"), "is a file")
    refuses(DataError, lambda: bring(mmrec / "nowhere"), mmrec / "nowhere")
