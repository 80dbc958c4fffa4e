"""Pickles are read without executing them: hostile ones are refused and do nothing."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from ckd_fed.data.importers.safe_pickle import read_sparse_pickle
from ckd_fed.errors import DataError


def dense():
    return np.random.default_rng(1).integers(0, 3, size=(6, 9)).astype(np.float64)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix, sparse.csr_array, sparse.coo_array])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_matrices_of_every_kind(tmp_path, make, dtype, protocol):
    wanted = dense().astype(dtype)
    path = tmp_path / "mat"
    path.write_bytes(pickle.dumps(make(wanted), protocol=protocol))
    np.testing.assert_array_equal(read_sparse_pickle(path).toarray(), wanted.astype(np.float64))


def test_names_of_older_releases(tmp_path):
    """What scipy < 1.8 and numpy < 2 wrote."""
    data = pickle.dumps(sparse.csr_matrix(dense()), protocol=2)
    old = data.replace(b"scipy.sparse._csr\n", b"scipy.sparse.csr\n").replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    assert old != data
    path = tmp_path / "mat"
    path.write_bytes(old)
    np.testing.assert_array_equal(read_sparse_pickle(path).toarray(), dense())


class Touch:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, refuses, protocol):
    witness, path = tmp_path / "witness", tmp_path / "mat"
    path.write_bytes(pickle.dumps(Touch(witness), protocol=protocol))
    refuses(DataError, lambda: read_sparse_pickle(path), path, "open", "save_npz")
    assert not witness.exists()
    pickle.loads(path.read_bytes())
    assert witness.exists()  # so the pickle was hostile indeed


def test_a_hostile_pickle_inside_a_matrix(tmp_path, refuses):
    witness, path = tmp_path / "witness", tmp_path / "mat"
    matrix = sparse.csr_matrix(dense())
    matrix.extra = Touch(witness)
    path.write_bytes(pickle.dumps(matrix))
    refuses(DataError, lambda: read_sparse_pickle(path), "open")
    assert not witness.exists()


@pytest.mark.parametrize("opcodes", [
    b"(S'x'\nios\nsystem\n.",  # INST
    b"(cos\nsystem\nS'x'\no.",  # OBJ
    b"\x80\x02\x82\x01.",  # EXT1
    b"Pabc\n.",  # PERSID
    b"\x80\x02cnumpy\ndtype\nK\x01\x85R}b.",  # a state on what is no matrix
    b"\x80\x02K\x01K\x02R.",  # a call of a number
    b"\x80\x02cscipy.sparse\ncsr_matrix\n)\x81}X\x06\x00\x00\x00_shapeK\x01K\x01\x86sb.",  # a matrix of nothing
    b"", b".", b"\x80", b"garbage",
])  # fmt: skip
def test_opcodes_that_no_matrix_needs(tmp_path, refuses, opcodes):
    path = tmp_path / "mat"
    path.write_bytes(opcodes)
    refuses(DataError, lambda: read_sparse_pickle(path), path)


def test_a_lil_or_dok_matrix_is_refused_with_the_conversion(tmp_path, refuses):
    path = tmp_path / "mat"
    for make in (sparse.lil_matrix, sparse.dok_matrix):
        path.write_bytes(pickle.dumps(make(dense())))
        message = refuses(DataError, lambda: read_sparse_pickle(path), path)
        command = message.partition('python -c "')[2].rstrip('"')
        subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
        np.testing.assert_array_equal(sparse.load_npz(tmp_path / "mat.npz").toarray(), dense())


def test_forged_matrices(tmp_path, refuses):
    for key, value in (
        ("indices", np.array([99] * 54)),
        ("indptr", np.array([0, 1])),
        ("_shape", (2**60, 9)),
        ("data", np.ones(3)),
        ("_shape", (6, -9)),
    ):
        matrix = sparse.csr_matrix(np.ones((6, 9)))
        matrix.__dict__[key] = value
        path = tmp_path / "mat"
        path.write_bytes(pickle.dumps(matrix))
        refuses(DataError, lambda path=path: read_sparse_pickle(path), path)


def test_random_damage_never_escapes_or_runs(tmp_path):
    """Some thousand damaged files: a matrix or a DataError of one line."""
    content, rng = pickle.dumps(sparse.csr_matrix(dense())), np.random.default_rng(5)
    path = tmp_path / "mat"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(bytes(data[: rng.integers(1, len(data))]) if rng.random() < 0.2 else bytes(data))
        try:
            assert sparse.issparse(read_sparse_pickle(path))
            outcomes["read"] += 1
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017  # either outcome is right
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes
