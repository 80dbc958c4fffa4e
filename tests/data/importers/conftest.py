"""One small problem, and its files in every layout that is imported."""

import csv
import json
import pickle

import numpy as np
import pytest
from scipy import sparse

from ckd_fed.data.dataset import SPLITS

N_USERS, N_ITEMS = 9, 14


@pytest.fixture
def problem():
    """Split -> {user: items} that shows every user and item, and features whose row k starts with k."""
    rng = np.random.default_rng(3)
    splits = {split: {} for split in SPLITS}
    for user in range(N_USERS):
        items = rng.permutation(N_ITEMS)
        items = [N_ITEMS - 1, *items[items != N_ITEMS - 1]] if user == 0 else items
        splits["train"][user] = sorted(map(int, items[:5]))
        splits["val"][user] = sorted(map(int, items[5:7]))
        splits["test"][user] = sorted(map(int, items[7:8]))
    features = {m: np.column_stack([np.arange(N_ITEMS), rng.normal(size=(N_ITEMS, d))]) for m, d in (("image", 3), ("text", 5))}
    return splits, {m: matrix.astype(np.float32) for m, matrix in features.items()}


@pytest.fixture
def pairs(problem):
    """(user, item, part) of every interaction."""
    return [(user, item, k) for k, split in enumerate(SPLITS) for user, row in problem[0][split].items() for item in row]


@pytest.fixture
def save_features(problem):
    def save(directory):
        for modality, matrix in problem[1].items():
            np.save(directory / f"{modality}_feat.npy", matrix)

    return save


@pytest.fixture
def lattice(tmp_path, problem, save_features):
    """``5-core/*.json``, ``item_list.txt`` and features above, as LATTICE's build_data.py writes them."""
    directory = tmp_path / "lattice"
    core = directory / "5-core"
    core.mkdir(parents=True)
    for split, table in problem[0].items():
        (core / f"{split}.json").write_text(json.dumps(table))
    (core / "item_list.txt").write_text("".join(f"B{item:03d}\t{item}\n" for item in range(N_ITEMS)))
    (core / "user_list.txt").write_text("".join(f"A{user:03d}\t{user}\n" for user in range(N_USERS)))
    save_features(directory)
    return directory


@pytest.fixture
def mmrec(tmp_path, pairs, save_features):
    directory = tmp_path / "mmrec"
    directory.mkdir()
    rows = "".join(f"{user}\t{item}\t5.0\t1393545600\t{part}\n" for user, item, part in pairs)
    (directory / "tiny.inter").write_text("userID\titemID\trating\ttimestamp\tx_label\n" + rows)
    (directory / "i_id_mapping.csv").write_text("asin\titemID\n" + "".join(f"B{item:03d}\t{item}\n" for item in range(N_ITEMS)))
    save_features(directory)
    return directory


@pytest.fixture
def matrices(pairs):
    """Split -> COO matrix of users × items."""
    tables = {}
    for k, split in enumerate(SPLITS):
        users, items = np.array([(user, item) for user, item, part in pairs if part == k]).T
        tables[split] = sparse.coo_matrix((np.ones(len(users), dtype=np.float32), (users, items)), shape=(N_USERS, N_ITEMS))
    return tables


@pytest.fixture
def hkuds(tmp_path, matrices, save_features):
    """Factory: the pickled matrices in one of scipy's layouts and pickle's protocols."""

    def write(layout="csr", protocol=4, names=("train_mat", "val_mat", "test_mat"), name="hkuds"):
        directory = tmp_path / name
        directory.mkdir()
        for split, file in zip(SPLITS, names, strict=True):
            (directory / file).write_bytes(pickle.dumps(matrices[split].asformat(layout), protocol=protocol))
        save_features(directory)
        return directory

    return write


@pytest.fixture
def own(tmp_path, pairs, problem):
    """A CSV of interactions under ids of one's own and two feature tables in shuffled order, as parquet and npz."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    directory = tmp_path / "own"
    directory.mkdir()
    rng = np.random.default_rng(0)
    with (directory / "clicks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp", "split"])
        writer.writerows(
            [f"u{u}", f"sku-{i:02d}", 1000 + 7 * k, SPLITS[p]] for k, (u, i, p) in enumerate(np.array(pairs)[rng.permutation(len(pairs))])
        )
    order = rng.permutation(N_ITEMS)
    names = [f"sku-{item:02d}" for item in order]
    image, text = (problem[1][m][order] for m in ("image", "text"))
    parquet.write_table(pa.table({"item_id": names, **{f"v{k}": image[:, k] for k in range(image.shape[1])}}), directory / "image.parquet")
    np.savez(directory / "text.npz", ids=np.array(names), features=text)
    return directory


@pytest.fixture
def same(problem):
    """Assert item by item that a dataset is the problem."""

    def check(dataset, dtype=np.float32):
        for split, table in problem[0].items():
            part = getattr(dataset, split)
            assert {u: part.items[part.indptr[u] : part.indptr[u + 1]].tolist() for u in range(N_USERS)} == table
        assert dataset.n_items == N_ITEMS
        assert set(dataset.modalities) == set(problem[1])
        for modality, matrix in problem[1].items():
            np.testing.assert_array_equal(dataset.features[modality], matrix.astype(dtype))
        assert not dataset.masks

    return check
