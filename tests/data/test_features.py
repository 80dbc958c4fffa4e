"""Feature and mask files: what is accepted, and that nothing else gets past the reader."""

import os
import struct

import numpy as np
import pytest

from ckd_fed.data import features as module
from ckd_fed.data.features import features_fingerprint, load_features, load_mask, open_npy
from ckd_fed.errors import DataError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image_feat.npy"


@pytest.fixture
def forge(path):
    """Write an .npy file with any header text."""

    def write(header, payload=b"\0" * 96, version=(1, 0)):
        text = header.encode("latin1") + b"\n"
        path.write_bytes(b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + payload)
        return path

    return write


def header(shape="(24, 1)", descr="'<f4'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


class Bomb:
    """Leaves a folder behind when unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_loads_what_was_saved(path, dtype, order):
    matrix = np.asarray(np.random.default_rng(0).normal(size=(7, 3)), dtype=dtype, order=order)
    np.save(path, matrix)
    loaded = load_features(path, 7)
    assert isinstance(loaded, np.memmap)
    assert not loaded.flags.writeable
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, matrix)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_well_formed_header_is_read(forge, version):
    assert load_features(forge(header(), version=version), 24).shape == (24, 1)


def test_missing_file(path, refuses):
    refuses(DataError, lambda: load_features(path, 3), path, "does not exist")


@pytest.mark.parametrize("keep", [0, 3, 8, 60, 128, -1])
def test_truncated_file(path, refuses, keep):
    np.save(path, np.ones((5, 4), dtype=np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    refuses(DataError, lambda: load_features(path, 5), path)


def test_trailing_bytes(path, refuses):
    np.save(path, np.ones((5, 4), dtype=np.float32))
    path.write_bytes(path.read_bytes() + b"!")
    refuses(DataError, lambda: load_features(path, 5), path, "longer", "(5, 4)")


def test_objects_are_never_unpickled(path, tmp_path, refuses):
    trace = tmp_path / "unpickled"
    np.save(path, np.array([[Bomb(trace)]], dtype=object), allow_pickle=True)
    refuses(DataError, lambda: load_features(path, 1), path, "object")
    refuses(DataError, lambda: load_mask(path, 1), path, "object")
    assert not trace.exists()
    np.load(path, allow_pickle=True)
    assert trace.exists(), "the bomb does not work, so the test shows nothing"


def test_a_pickle_is_no_npy(path, tmp_path, refuses):
    import pickle

    path.write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    refuses(DataError, lambda: load_features(path, 1), path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "text",
    [
        header("(25, 1)"),
        header("(1000000000000, 1000000000000)"),
        header("(18446744073709551616, 1)"),
        header("(4611686018427387905, 4)"),  # 2**64 + 4 entries: wraps to 4 in 64 bits
        header("(-24, 1)"),
        header("(-24, -1)"),
        header("(-24,)"),
        header("(0, 24)"),
        header("(24, 0)"),
        header("(True, 24)"),
        header("24"),
        header("[24, 1]"),
        header("(24.0, 1)"),
        header("(24, 1"),
        header(f"({'9' * 4200}, {'9' * 4200})"),
        header(f"({'9' * 9000}, 1)"),
        header(descr="'|O'"),
        header(descr="'<q9'"),
        header(descr="5"),
        header(descr="()"),
        header(descr="[()]"),
        header(descr="{}"),
        header(descr="'|V0'"),
        header(descr="[('a', '<f4')]"),
        header(descr="('<f4', (2,))"),
        header(order="'x'"),
        header()[:-1],
        "{1: 2, 'a': 3}",
        "{[]: 1}",
        "{}",
        "",
        "\0",
        "(" * 3000,
        "-" * 5000 + "1",
        " " * 20_000,
        "import os",
    ],
    ids=lambda text: text[:60],
)
def test_forged_headers_are_refused(forge, refuses, text):
    path = forge(text)
    message = refuses(DataError, lambda: load_features(path, 24), path)
    assert "allow_pickle" not in message


def test_a_header_that_claims_more_than_the_file_holds_names_both(forge, refuses):
    refuses(DataError, lambda: load_features(forge(header("(25, 1)")), 25), "(25, 1)", "truncated")


def test_a_header_of_objects_that_fits_the_file(forge, refuses):
    path = forge(header("(12, 1)", descr="'|O'"))
    refuses(DataError, lambda: load_features(path, 12), path, "Python objects", "never unpickled")


def test_a_header_longer_than_the_file(path, refuses):
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{")
    refuses(DataError, lambda: open_npy(path), path)


def test_an_unknown_version(forge, refuses):
    path = forge(header(), version=(9, 0))
    refuses(DataError, lambda: open_npy(path), path)


def test_a_folder_is_no_file(path, refuses):
    path.mkdir()
    refuses(DataError, lambda: load_features(path, 3), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_entries_name_column_and_count(path, refuses, monkeypatch, value):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 40)  # two rows a block
    matrix = np.zeros((9, 5), dtype=np.float32)
    matrix[[1, 4, 8], 3] = value
    matrix[6, 4] = value
    np.save(path, matrix)
    refuses(DataError, lambda: load_features(path, 9), path, "4 NaN or infinite entries", "2 of 5 columns", "column 3 with 3")


def test_wrong_number_of_rows(path, refuses):
    np.save(path, np.zeros((9, 2), dtype=np.float32))
    refuses(DataError, lambda: load_features(path, 10), path, "9 rows", "10 items")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "complex64", "U3", "M8[s]", ">f4", "bool"])
def test_wrong_dtype(path, refuses, dtype):
    np.save(path, np.zeros((4, 2), dtype=dtype))
    refuses(DataError, lambda: load_features(path, 4), path, np.dtype(dtype))


@pytest.mark.parametrize("shape", [(), (24,), (4, 3, 2)])
def test_wrong_number_of_dimensions(path, refuses, shape):
    np.save(path, np.zeros(shape, dtype=np.float32))
    refuses(DataError, lambda: load_features(path, 4), path, shape)


def test_no_mask_file_means_all(path):
    assert load_mask(path, 3) is None


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float32"])
def test_masks(path, dtype):
    np.save(path, np.array([1, 0, 1], dtype=dtype))
    mask = load_mask(path, 3)
    assert mask.dtype == bool
    assert mask.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("mask", "mentions"),
    [
        (np.array([1, 0]), ["(2,)", "(3,)"]),
        (np.array([[1, 0, 1]]), ["(1, 3)", "(3,)"]),
        (np.array([1, 2, 0]), ["first: 2"]),
        (np.array([1, -1, 0]), ["first: -1"]),
        (np.array([1, np.nan, 0]), ["nan"]),
        (np.array([1, 0.5, 0]), ["0.5"]),
        (np.zeros(3), ["every item"]),
        (np.array(["0", "1", "1"]), []),
        (np.zeros(3, dtype="M8[s]"), []),
        (np.zeros(3, dtype="V4"), []),
        (np.zeros(3, dtype=[("a", "i4")]), []),
    ],
    ids=str,
)
def test_bad_masks(path, refuses, mask, mentions):
    np.save(path, mask)
    refuses(DataError, lambda: load_mask(path, 3), path, *mentions)


def test_fingerprint_depends_on_every_part(path, monkeypatch):
    matrix = np.arange(24, dtype=np.float32).reshape(6, 4)
    np.save(path, matrix)
    whole = features_fingerprint(open_npy(path))
    monkeypatch.setattr(module, "_BLOCK_BYTES", 20)
    assert features_fingerprint(matrix) == features_fingerprint(np.asfortranarray(matrix)) == whole
    changed = matrix.copy()
    changed[5, 3] += 1
    others = [matrix.reshape(4, 6), matrix.astype(np.float64), matrix.view(np.int32), changed]
    assert len({whole, *map(features_fingerprint, others)}) == 5
