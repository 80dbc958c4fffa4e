"""One's own tables: every format aligned by id and compared item by item, and what is refused."""

import csv
import json
import tracemalloc
from decimal import Decimal

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckd_fed.cli import main
from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.draft import write_draft
from ckd_fed.data.importers.detect import read_draft
from ckd_fed.data.importers.own import Options, sorted_ids
from ckd_fed.data.importers.tables import read_interactions
from ckd_fed.data.importers.vectors import align, modality_of, read_vectors
from ckd_fed.errors import DataError

NAMES = [f"sku-{item:02d}" for item in range(14)]


@pytest.fixture
def bring(tmp_path):
    def run(*paths, dtype="", features=None, **options):
        destination = tmp_path / "home" / "made"
        write_draft(read_draft(list(paths), features=features, options=Options(**options)), destination, dtype=dtype, replace=True)
        return load_dataset(destination, at_least=1)

    return run


def notes(dataset):
    return json.loads((dataset.directory / "manifest.json").read_text())["notes"]


def test_a_folder_of_own_tables(own, bring, same):
    dataset = bring(own)
    same(dataset)
    assert json.loads((dataset.directory / "items.json").read_text()) == NAMES
    assert notes(dataset) == []


def write_features(path, names, matrix):
    """One feature table in the format of its ending."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["a", "item_id", *range(1, matrix.shape[1])])
            writer.writerows([row[0], name, *row[1:]] for name, row in zip(names, matrix.tolist(), strict=True))
    elif path.suffix == ".npy":
        np.save(path, matrix)
        path.with_name(path.stem + "_ids.txt").write_text("\n".join(names) + "\n")
    elif path.suffix == ".npz":
        np.savez_compressed(path, asin=np.array(names), image=matrix)
    elif path.suffix == ".safetensors":
        save_file({"embeddings": matrix}, path, metadata={"ids": json.dumps(names)})
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"vector": matrix.tolist(), "id": names}), path)


@pytest.mark.parametrize("ending", [".csv", ".npy", ".npz", ".safetensors", ".parquet"])
def test_every_format_of_features(own, problem, bring, same, ending):
    (own / "image.parquet").unlink()
    order = np.random.default_rng(1).permutation(14)
    write_features(own / f"image_features{ending}", [NAMES[k] for k in order], problem[1]["image"][order])
    same(bring(own))


@pytest.mark.parametrize("ending", [".csv", ".npy", ".npz", ".safetensors", ".parquet"])
def test_missing_items_are_masked_and_extra_ones_dropped(own, problem, bring, ending):
    (own / "image.parquet").unlink()
    keep = [11, 0, 5, 7, 13, 2]
    matrix = np.concatenate([problem[1]["image"][keep], np.full((2, 4), 9, dtype=np.float32)])
    write_features(own / f"image{ending}", [*(NAMES[k] for k in keep), "elsewhere", "sku-99"], matrix)
    dataset = bring(own)
    mask = np.isin(np.arange(14), keep)
    np.testing.assert_array_equal(dataset.masks["image"], mask)
    np.testing.assert_array_equal(dataset.features["image"], np.where(mask[:, None], problem[1]["image"], 0))
    assert "text" not in dataset.masks
    assert [note.partition(": ")[2][:15] for note in notes(dataset)] == ["8 of 14 items h", "2 rows belong t"]


def list_types(pa):
    return [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 4), pa.list_(pa.int64()), pa.list_(pa.float16())]


@pytest.mark.parametrize("which", range(5))
def test_lists_of_every_kind_over_several_batches(tmp_path, which):
    """The first batch has no vector at all, the others have gaps."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    matrix = np.random.default_rng(0).integers(-99, 99, (2500, 4)).astype(np.float32)
    rows = [None if k < 1100 or k % 7 == 0 else row for k, row in enumerate(matrix.astype(np.float16) if which == 4 else matrix.tolist())]
    table = pa.table({"id": range(2500), "vector": pa.array(rows, list_types(pa)[which])})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=700)
    found = read_vectors(tmp_path / "x.parquet")
    assert found.matrix.dtype == np.float32
    assert found.ids == [str(k) for k in range(2500)]
    for k, row in enumerate(rows):
        np.testing.assert_array_equal(found.matrix[k], np.full(4, np.nan) if row is None else row)


def test_lists_take_the_memory_of_the_array_that_they_become(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    matrix = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(matrix.ravel(), 64)
    parquet.write_table(pa.table({"id": range(len(matrix)), "vector": vectors}), tmp_path / "x.parquet")
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    found = read_vectors(tmp_path / "x.parquet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found.matrix, matrix)
    assert peak < 2 * matrix.nbytes
    assert pa.total_allocated_bytes() - before < matrix.nbytes


@pytest.mark.parametrize(("change", "mentions"), [
    (lambda rows: [*rows[:5], rows[5][:3], *rows[6:]], ["'sku-05' has 3 numbers, those before have 4"]),
    (lambda rows: [*rows[:5], [1.0, None, 2.0, 3.0], *rows[6:]], ["'sku-05' has nan in column 2"]),
    (lambda rows: [*rows[:5], [1.0, 1e300, 2.0, 3.0], *rows[6:]], ["'sku-05' has inf in column 2"]),
    (lambda rows: [list(map(str, row)) for row in rows], ["'vector' holds list", "numbers are needed"]),
    (lambda rows: [[row] for row in rows], ["'vector' holds list", "numbers are needed"]),
    (lambda rows: [[] for _ in rows], ["matrix of numbers"]),
])  # fmt: skip
def test_lists_that_are_refused(own, problem, bring, refuses, change, mentions):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    vectors = pa.array(change(problem[1]["image"].tolist()))
    vectors = vectors.cast(pa.list_(pa.float64())) if vectors.type == pa.list_(pa.null()) else vectors
    parquet.write_table(pa.table({"id": NAMES, "vector": vectors}), own / "image.parquet")
    refuses(DataError, lambda: bring(own), "image.parquet", *mentions)


def test_the_index_that_pandas_writes_is_no_feature(own, problem, bring, same):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = parquet.read_table(own / "image.parquet")
    parquet.write_table(table.append_column("__index_level_0__", pa.array([f"row {k}" for k in range(14)])), own / "image.parquet")
    dataset = bring(own)
    same(dataset)
    assert notes(dataset) == ["image.parquet: the column '__index_level_0__' is an index that pandas wrote and was left out"]
    parquet.write_table(
        pa.table({"id": NAMES, "vector": problem[1]["image"].tolist(), "__index_level_0__": range(14)}),
        own / "image.parquet",
    )
    same(bring(own))
    (own / "image.parquet").unlink()
    for name in ("", "Unnamed: 0"):
        rows = [[k, sku, *vector] for k, (sku, vector) in enumerate(zip(NAMES, problem[1]["image"].tolist(), strict=True))]
        (own / "image.csv").write_text("\n".join(",".join(map(str, row)) for row in [[name, "item_id", *"abcd"], *rows]))
        dataset = bring(own)
        same(dataset)
        assert notes(dataset) == [f"image.csv: the column {name!r} is an index that pandas wrote and was left out"]


def test_a_table_of_nothing_but_ids_and_an_index(own, bring, refuses):
    (own / "image.parquet").unlink()
    (own / "image.csv").write_text(",item_id\n" + "".join(f"{k},{name}\n" for k, name in enumerate(NAMES)))
    refuses(DataError, lambda: bring(own), "image.csv", "no column but the ids")


def test_an_empty_vector_is_a_missing_one_but_half_a_vector_is_a_fault(own, problem, bring, refuses):
    (own / "image.parquet").unlink()
    rows = [[name, *row] for name, row in zip(NAMES, problem[1]["image"].tolist(), strict=True)]
    rows[4][1:] = ["", "", "", ""]
    write = lambda: (own / "image.csv").write_text("\n".join(",".join(map(str, row)) for row in [["item", "a", "b", "c", "d"], *rows]))  # noqa: E731
    write()
    np.testing.assert_array_equal(bring(own).masks["image"], np.arange(14) != 4)
    rows[4][1:] = ["1", "nan", "2", "3"]
    write()
    refuses(DataError, lambda: bring(own), "image.csv", "sku-04", "column 2")
    rows[4][1:] = ["1", "", "2", "3"]
    write()
    refuses(DataError, lambda: bring(own), "image.csv", "line 6", "b is ''")


def test_integer_ids_meet_those_that_pandas_made_floats(tmp_path, problem, pairs, bring, same):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parts = ["train", "valid", "test"]
    users, items, part = zip(*pairs, strict=True)
    parquet.write_table(pa.table({"uid": users, "iid": list(map(float, items)), "split": [parts[k] for k in part]}), tmp_path / "log.parquet")
    order = np.random.default_rng(2).permutation(14)
    for modality, matrix in problem[1].items():
        save_file({"ids": order, "features": matrix[order]}, tmp_path / f"{modality}.safetensors")
    same(bring(tmp_path / "log.parquet", tmp_path / "image.safetensors", tmp_path / "text.safetensors"))


def test_rows_are_ids_only_if_asked_for(tmp_path, problem, pairs, bring, same, refuses):
    (tmp_path / "log.csv").write_text("user,item,x_label\n" + "".join(f"{u},{i},{k}\n" for u, i, k in pairs))
    for modality, matrix in problem[1].items():
        np.save(tmp_path / f"{modality}_feat.npy", matrix)
    paths = [tmp_path / name for name in ("log.csv", "image_feat.npy", "text_feat.npy")]
    refuses(DataError, lambda: bring(*paths), "image_feat.npy", "--rows-are-ids", "image_feat_ids.txt")
    same(bring(*paths, rows_are_ids=True))


def test_named_columns_and_modalities(own, problem, bring, same, refuses):
    text = (own / "clicks.csv").read_text().replace("user_id,item_id,timestamp,split", "who;what;when;fold".replace(";", ","))
    (own / "clicks.csv").write_text(text)
    (own / "image.parquet").rename(own / "export-3.parquet")
    refuses(DataError, lambda: bring(own), "--user-column")
    columns = {"user_column": "who", "item_column": "what", "split_column": "fold"}
    same(bring(own, features={"image": own / "export-3.parquet"}, **columns))
    refuses(DataError, lambda: bring(own, features={"image": own / "export-3.parquet"}, **{**columns, "split_column": "flod"}), "did you mean 'fold'")


def test_the_order_of_rows_carries_no_meaning(own, bring):
    (own / "clicks.csv").write_text("\n".join(",".join(line.split(",")[:2]) for line in (own / "clicks.csv").read_text().splitlines()))
    first = bring(own)
    lines = (own / "clicks.csv").read_text().splitlines()
    (own / "clicks.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert bring(own).fingerprint == first.fingerprint
    assert bring(own, seed=124).fingerprint != first.fingerprint
    assert [len(first.train), len(first.val), len(first.test)] == [9 * 6, 9, 9]


def test_a_rule_goes_before_a_column_that_looks_like_a_split(own, bring, refuses):
    dataset = bring(own, rule="leave-one-out")
    rows = list(csv.DictReader((own / "clicks.csv").open()))
    for user in range(9):
        ordered = sorted((row for row in rows if row["user_id"] == f"u{user}"), key=lambda row: int(row["timestamp"]))
        assert [NAMES[i] for i in dataset.test.items[dataset.test.indptr[user] : dataset.test.indptr[user + 1]]] == [ordered[-1]["item_id"]]
        assert [NAMES[i] for i in dataset.val.items[dataset.val.indptr[user] : dataset.val.indptr[user + 1]]] == [ordered[-2]["item_id"]]
    refuses(DataError, lambda: bring(own, rule="random", split_column="split"), "one of them")
    refuses(DataError, lambda: bring(own, rule="randm"), "did you mean 'random'")


@pytest.mark.parametrize("rule", ["leave-one-out", "temporal"])
def test_a_rule_that_goes_by_time_needs_a_time_column(own, bring, refuses, rule):
    (own / "clicks.csv").write_text((own / "clicks.csv").read_text().replace("timestamp", "when"))
    refuses(DataError, lambda: bring(own, rule=rule), "clicks.csv", rule, "--time-column", "user_id, item_id, when, split")
    dataset = bring(own, rule=rule, time_column="when")
    assert json.loads((dataset.directory / "manifest.json").read_text())["split"]["rule"] == rule


def time_columns(pa):
    """Columns of five moments, each after the one before, by what they are made of."""
    seconds = [1_400_000_000 + k for k in range(5)]
    nanoseconds = [1_400_000_000_000_000_001 + 1000 * k for k in range(5)]
    return {
        "float seconds": pa.array([second + 0.25 for second in seconds]),
        "integers": pa.array(seconds),
        "decimals": pa.array([Decimal(second) for second in seconds]),
        "nanoseconds": pa.array(nanoseconds, pa.timestamp("ns")),
        "nanoseconds with a zone": pa.array(nanoseconds, pa.timestamp("ns", "Europe/Paris")),
        "seconds": pa.array(seconds, pa.timestamp("s")),
        "dates": pa.array([16_000 + k for k in range(5)], pa.date32()),
        "texts": pa.array([f"2014-05-1{k}" for k in range(5)]),
        "categories": pa.array([f"2014-05-1{k}T00:00:00Z" for k in range(5)]).dictionary_encode(),
    }


@pytest.mark.parametrize("kind", [
    "float seconds", "integers", "decimals", "nanoseconds", "nanoseconds with a zone", "seconds", "dates", "texts", "categories",
])  # fmt: skip
def test_times_in_parquet_are_read_as_what_they_are(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = time_columns(pa)[kind].take(pa.array([3, 0, 4, 1, 2]))
    parquet.write_table(pa.table({"user": ["a"] * 5, "item": list("vwxyz"), "time": column}), tmp_path / "log.parquet")
    times = read_interactions(tmp_path / "log.parquet", rule="temporal").times
    assert times.argsort().tolist() == [1, 3, 4, 0, 2]
    assert 1.38e9 < times.min() < times.max() < 1.41e9


def test_times_in_parquet_that_are_refused(tmp_path, refuses):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "log.parquet"
    for column, mentions in (
        ([1.5, None, 2.5], ["row 2: time is empty"]),
        ([1.5, 2.5, float("nan")], ["row 3: time is nan"]),
        ([None, None, None], ["row 1: time is empty"]),
        (["2014-05-01", "yesterday", "2014-05-02"], ["line 2: time is 'yesterday'", "ISO date"]),
        ([True, False, True], ["'time' holds bool"]),
    ):
        parquet.write_table(pa.table({"user": list("aab"), "item": list("xyz"), "time": column}), path)
        refuses(DataError, lambda: read_interactions(path, rule="temporal"), path, *mentions)
        assert len(read_interactions(path, rule="random").users) == 3
    moments = pa.array([1, 2, 3], pa.timestamp("ns"))
    parquet.write_table(pa.table({"user": moments, "item": list("xyz")}), path)
    refuses(DataError, lambda: read_interactions(path), path)  # moments are no ids


def test_a_damaged_page_names_the_file(tmp_path, refuses):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "log.parquet"
    parquet.write_table(pa.table({"user": [f"u{k}" for k in range(500)], "item": range(500)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[60:200] = bytes(140)
    path.write_bytes(content)
    refuses(DataError, lambda: read_interactions(path), path, "no readable parquet file")


def test_repeated_rows_keep_the_earliest_time(tmp_path, bring):
    rows = [("a", "x", 9), ("a", "y", 2), ("a", "z", 3), ("b", "x", 1), ("b", "y", 2), ("b", "z", 3), ("a", "x", 1)]
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    np.savez(tmp_path / "text.npz", ids=["x", "y", "z"], features=np.eye(3))
    dataset = bring(tmp_path / "log.csv", tmp_path / "text.npz", rule="leave-one-out")
    assert dataset.test.items.tolist() == [2, 2]
    assert any("1 rows repeat" in note for note in notes(dataset))


@pytest.mark.parametrize(("edit", "mentions"), [
    (lambda t: t.replace("user_id,", "who,"), ["--user-column", "clicks.csv"]),
    (lambda t: t.replace("user_id,item_id", "user_id,user"), ["--user-column"]),
    (lambda t: t.replace(",train\n", ",training set\n", 1), ["'training set'", "line "]),
    (lambda t: t.replace(",train\n", "\n", 1), ["3 fields, the header has 4", "line "]),
    (lambda t: t.replace("u3,", ",", 1), ["user_id is empty", "line "]),
    (lambda t: t + t.splitlines()[5].rpartition(",")[0] + ("," + ("val" if t.splitlines()[5].endswith("train") else "train")), ["two parts"]),
    (lambda t: t.splitlines()[0] + "\n", ["no rows"]),
    (lambda t: "", ["is empty"]),
    (lambda t: t + '"open', ["line "]),
    (lambda t: t + "a\0b,c,1,train\n", ["line "]),
    (lambda t: t.replace("timestamp", "user"), ["2 columns that could be the user", "--user-column"]),
    (lambda t: t.replace("timestamp", "user_id"), ["clicks.csv", "the column 'user_id' twice", "another name in the file"]),
    (lambda t: t.replace("timestamp", "split"), ["the column 'split' twice", "another name in the file"]),
    (lambda t: t.replace(",test\n", ",train\n"), ["leaves test empty"]),
    (lambda t: t.replace("sku-", "SKU "), ["image.parquet", "'SKU 00'", "of one kind"]),
])  # fmt: skip
def test_interactions_that_are_refused(own, bring, refuses, edit, mentions):
    (own / "clicks.csv").write_text(edit((own / "clicks.csv").read_text()))
    refuses(DataError, lambda: bring(own), *mentions)


@pytest.mark.parametrize(("edit", "mentions"), [
    (lambda t: t.replace("1007,", "yesterday,", 1), ["timestamp is 'yesterday'", "line "]),
    (lambda t: t.replace("1007,", "nan,", 1), ["timestamp is 'nan'"]),
    (lambda t: t.replace("1007,", "10_07,", 1), ["timestamp is '10_07'"]),
    (lambda t: t.replace("split", "date"), ["2 columns that could be the time"]),
])  # fmt: skip
def test_times_count_where_the_rule_goes_by_them(own, bring, refuses, edit, mentions):
    """Or where a column of them is named; for other rules a date in an unusual form is nobody's concern."""
    (own / "clicks.csv").write_text(edit((own / "clicks.csv").read_text()))
    refuses(DataError, lambda: bring(own, rule="leave-one-out"), *mentions)
    if len(mentions) == 2:
        refuses(DataError, lambda: bring(own, rule="random", time_column="timestamp"), *mentions)
    assert bring(own, rule="random").n_users


def test_ids_that_floats_cannot_tell_apart_are_refused(tmp_path, refuses):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "log.parquet"
    parquet.write_table(pa.table({"user": [1.0, 2.0], "item": [2.0**53 - 1, 7.0]}), path)
    assert read_interactions(path).items == ["9007199254740991", "7"]
    parquet.write_table(pa.table({"user": [1.0, 2.0], "item": [7.0, 2.0**53]}), path)
    refuses(DataError, lambda: read_interactions(path), path, "row 2", "item is 9007199254740992.0", "write integers or texts")


def test_a_table_that_is_not_utf8_names_the_line(own, bring, refuses):
    lines = (own / "clicks.csv").read_bytes().splitlines()
    lines[6] = b"\xfc" + lines[6]
    (own / "clicks.csv").write_bytes(b"\n".join(lines))
    refuses(DataError, lambda: bring(own), "clicks.csv", "line 7", "UTF-8")


def test_an_id_twice(own, problem, bring, refuses, same):
    matrix = problem[1]["text"]
    np.savez(own / "text.npz", ids=[*NAMES, NAMES[3]], features=np.concatenate([matrix, matrix[3:4]]))
    dataset = bring(own)
    same(dataset)
    assert any("1 rows repeat another" in note for note in notes(dataset))
    np.savez(own / "text.npz", ids=[*NAMES, NAMES[3]], features=np.concatenate([matrix, matrix[4:5]]))
    refuses(DataError, lambda: bring(own), "text.npz", "sku-03", "rows 4 and 15")


@pytest.mark.parametrize("kept", ["ids", "metadata", "sidecar", "table"])
def test_a_column_of_ids_that_is_named_may_be_one_tables_alone(own, problem, bring, same, kept):
    """The option holds for all tables; the others may have their ids under another name, or elsewhere."""
    (own / "image.parquet").unlink()
    rows = "".join(",".join([name, *map(repr, row.tolist())]) + "\n" for name, row in zip(NAMES, problem[1]["image"], strict=True))
    (own / "image.csv").write_text("what,a,b,c,d\n" + rows)
    if kept == "table":
        rows = "".join(",".join([name, *map(repr, row.tolist())]) + "\n" for name, row in zip(NAMES, problem[1]["text"], strict=True))
        (own / "text.npz").unlink()
        (own / "text.csv").write_text("item_id,a,b,c,d,e,f\n" + rows)
        same(bring(own, id_column="what"))
        return
    if kept != "ids":
        (own / "text.npz").unlink()
        metadata = {"ids": json.dumps(NAMES)} if kept == "metadata" else None
        save_file({"features": problem[1]["text"]}, own / "text.safetensors", metadata=metadata)
    if kept == "sidecar":
        (own / "text_ids.json").write_text(json.dumps(NAMES))
    same(bring(own, id_column="what"))


def test_a_column_of_ids_that_no_table_has_is_told(own, bring, refuses):
    refuses(DataError, lambda: bring(own, id_column="nope"), "--id-column is 'nope'", "image.parquet by", "text.npz by")


@pytest.mark.parametrize("ending", [".csv", ".npz", ".safetensors", ".parquet"])
def test_of_several_ids_none_is_chosen_by_luck(own, problem, bring, refuses, ending):
    (own / "image.parquet").unlink()
    path, rows, matrix = own / f"image{ending}", np.arange(14), problem[1]["image"]
    if ending == ".csv":
        np.savetxt(path, np.column_stack([rows, rows[::-1], matrix]), delimiter=",", header="id,item_id,a,b,c,d", comments="")
    elif ending == ".npz":
        np.savez(path, id=rows, item_id=rows[::-1], features=matrix)
    elif ending == ".safetensors":
        save_file({"id": rows, "item_id": rows[::-1].copy(), "features": matrix}, path)
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"id": rows, "item_id": rows[::-1], "vector": matrix.tolist()}), path)
    refuses(DataError, lambda: bring(own), path, "2 columns that could be the id (id, item_id)", "--id-column")


def test_ids_in_a_tensor_and_in_the_metadata(own, problem, bring, refuses):
    (own / "image.parquet").unlink()
    save_file({"ids": np.arange(14), "features": problem[1]["image"]}, own / "image.safetensors", metadata={"ids": json.dumps(NAMES)})
    refuses(DataError, lambda: bring(own), "image.safetensors", "in the tensor 'ids' and in its metadata", "--id-column ids")


def test_features_that_are_refused(own, problem, bring, refuses):
    matrix = problem[1]["text"]
    np.savez(own / "text.npz", ids=NAMES[:-1], features=matrix)
    refuses(DataError, lambda: bring(own), "text.npz", "14 rows", "13 ids")
    np.savez(own / "text.npz", ids=NAMES, features=matrix, other=matrix)
    assert bring(own).features["text"].shape == (14, 6)  # the name 'features' decides
    np.savez(own / "text.npz", ids=NAMES, one=matrix, other=matrix)
    refuses(DataError, lambda: bring(own), "text.npz", "2 arrays", "'features'")
    np.savez(own / "text.npz", ids=np.array(NAMES, dtype=object), features=matrix)
    refuses(DataError, lambda: bring(own), "text.npz", "never unpickled")
    np.savez(own / "text.npz", ids=NAMES, features=matrix.astype("U"))
    refuses(DataError, lambda: bring(own), "text.npz", "matrix of numbers")
    bad = matrix.copy()
    bad[2, 1] = np.inf
    np.savez(own / "text.npz", ids=NAMES, features=bad)
    refuses(DataError, lambda: bring(own), "text.npz", "sku-02", "inf in column 2")
    np.savez(own / "text.npz", ids=NAMES, features=np.full((14, 3), np.nan))
    refuses(DataError, lambda: bring(own), "text.npz", "all of them are empty")
    np.savez(own / "text.npz", ids=NAMES, features=matrix.astype(np.float64) * 1e300)
    refuses(DataError, lambda: bring(own), "text.npz", "beyond float32")
    (own / "text.npz").unlink()
    (own / "image.parquet").unlink()
    refuses(DataError, lambda: bring(own), "without features")


def test_two_files_for_one_modality(own, bring, refuses):
    (own / "image.csv").write_text("id,a\nsku-00,1\n")
    refuses(DataError, lambda: bring(own), "image.csv", "image.parquet", "--features")


def test_a_file_and_an_option_for_one_modality(own, bring, refuses, same, monkeypatch):
    """The one would be dropped without a word."""
    np.savez(own / "image.npz", ids=NAMES, features=np.zeros((14, 3)))
    named = [own / "clicks.csv", own / "text.npz", own / "image.npz"]
    refuses(DataError, lambda: bring(*named, features={"image": own / "image.parquet"}), "image.npz", "image.parquet", "'image'", "--features")
    (own / "image.npz").rename(own / "other.npz")
    refuses(DataError, lambda: bring(own, features={"image": own / "other.npz"}), "image.parquet", "other.npz", "'image'")
    (own / "other.npz").unlink()
    same(bring(own, features={"image": own / "image.parquet"}))
    monkeypatch.chdir(own)  # one file under two names is one file
    same(bring(own, features={"image": (own / "image.parquet").relative_to(own)}))


@pytest.mark.parametrize("given", [{}, {"user_column": "nope"}, {"item_column": "nope"}, {"user_column": "item_id", "item_column": "nope"}])
def test_where_no_table_is_of_interactions_the_columns_are_listed(own, bring, refuses, given):
    (own / "clicks.csv").write_text((own / "clicks.csv").read_text().replace("user_id", "who"))
    message = refuses(
        DataError, lambda: bring(own, **given), "clicks.csv (columns: who, item_id, timestamp, split)", "image.parquet (columns: item_id,"
    )
    option = next((f"--{name[:4]}-column is 'nope'" for name, column in given.items() if column == "nope"), "")
    assert ("no table has a column of that name" in message) == bool(given)
    assert option in message


@pytest.mark.parametrize("given", ["", "item_id"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_column_that_is_there_twice_must_be_renamed(tmp_path, refuses, given, ending):
    """To name it on the command line would not help."""
    path = tmp_path / f"log{ending}"
    if ending == ".csv":
        path.write_text("user_id,item_id,item_id\nu,a,b\n")
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table([["u"], ["a"], ["b"]], names=["user_id", "item_id", "item_id"]), path)
    message = refuses(DataError, lambda: read_interactions(path, item_column=given), path, "the column 'item_id' twice", "another name")
    assert "--item-column" not in message


def test_cells_that_are_no_numbers_that_float32_holds(tmp_path, refuses, recwarn):
    path = tmp_path / "image.csv"
    path.write_text("id,a,b\nx,1,2\ny,1,1_0\n")
    refuses(DataError, lambda: read_vectors(path), path, "line 3", "b is '1_0'", "a number is needed")
    path.write_text("id,a_b,b\nx_1,1,2\ny_1,1e39,-1e-3\n")  # an underscore is welcome in names
    found = read_vectors(path)
    assert found.ids == ["x_1", "y_1"]
    np.testing.assert_array_equal(found.matrix, np.array([[1, 2], [np.inf, -1e-3]], dtype=np.float32))
    refuses(DataError, lambda: align(found, ["y_1"]), path, "y_1", "inf in column 1")
    assert not recwarn.list


@pytest.mark.parametrize("name", ["a/b", "keys", "forward", "my text", "text.v2", "bild\u00e9", "..", ""])
def test_a_modality_that_no_run_takes_is_refused(own, bring, refuses, tmp_path, name):
    features = {name: own / "image.parquet"}
    refuses(DataError, lambda: bring(own, features=features), f"modality {name!r} cannot be used", "--features NAME=FILE")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("name", "modality"), [
    ("image_feat.npy", "image"), ("image-features.parquet", "image"), ("text.csv", "text"), ("clip_embeddings.npz", "clip"), ("feat.npy", "feat"),
])  # fmt: skip
def test_the_modality_of_a_file(tmp_path, name, modality):
    assert modality_of(tmp_path / name) == modality


def test_ids_are_numbers_only_if_all_are():
    assert sorted_ids(["10", "9", "2", "9"]) == ["2", "9", "10"]
    assert sorted_ids(["10", "09", "2"]) == ["09", "10", "2"]
    assert sorted_ids(["b", "10", "9"]) == ["10", "9", "b"]


def test_the_command(own, tmp_path, capsys, same):
    home = tmp_path / "place"
    main(["data", "import", str(own), "--as", "mine", "--home", str(home)])
    out = capsys.readouterr().out
    assert "9 users, 14 items" in out
    assert "train 45, val 18, test 9" in out
    assert "image: 4-d float32 from image.parquet, no item lacks it" in out
    same(load_dataset(home / "data" / "mine"))
    assert [path.name for path in (home / "data").iterdir()] == ["mine"]
    for arguments, mention in (
        (["--as", "mine"], "--replace"),
        (["--as", "../x"], "plain name"),
        (["--as", "b", "--seed", "-1"], "--seed is -1"),
        (["--as", "b", "--features", "text"], "MODALITY=…"),
        (["--as", "b", "--layout", "mmrec"], ".inter"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "import", str(own), "--home", str(home), *arguments])
        error = capsys.readouterr().err
        assert mention in error
        assert error.count("\n") == 1
    assert [path.name for path in (home / "data").iterdir()] == ["mine"]
    main(["data", "import", str(own), "--as", "mine", "--home", str(home), "--replace", "--dtype", "float16"])
    same(load_dataset(home / "data" / "mine"), np.float16)
