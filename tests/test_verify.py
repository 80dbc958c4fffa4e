"""Reference vectors: reproduced, and a wrong number never passes."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ckd_fed.errors import DataError
from ckd_fed.verify import TOLERANCE, relative_error, report, verify

REFERENCE = Path(__file__).parent / "reference"
FILES = [REFERENCE / "vbpr.npz", REFERENCE / "mmgcn.npz"]

with np.load(FILES[0]) as _archive:
    _KEYS = list(_archive.files)
OUTPUTS = [key for key in _KEYS if key.split(".")[0] in ("out", "grad", "joint", "text_only", "image_only")]
SAMPLE = [
    "grad.t_gcn.g_layer2.bias",
    "grad.v_gcn.conv_embed_3.weight",
    "grad.item_embedding.weight",
    "out.effect_image",
    "out.weight_text",
    "text_only.item_emb",
    "out.generic_text",
    "out.kd_per_sample",
    "input.image_feats",
    "student.t_gcn.linear_layer1.weight",
    "text_teacher.t_gcn.conv_embed_2.bias",
    "const.kd_ratio",
    "const.decay",
]


@pytest.fixture
def altered(tmp_path):
    """Copy a reference file with some arrays replaced, or left out for None."""

    def write(source, **changes):
        with np.load(source) as archive:
            arrays = {**{name: archive[name] for name in archive.files}, **{key.replace("__", "."): value for key, value in changes.items()}}
        path = tmp_path / source.name
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path

    return write


def perturbed(source, key, relative=1e-6):
    """The array with its largest entry off by a millionth."""
    with np.load(source) as archive:
        array = archive[key].astype(np.float64)
    flat = array.reshape(-1)
    flat[np.abs(flat).argmax()] *= 1 + relative
    return array


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_published_numbers_are_reproduced(path):
    lines = []
    assert report(path, lines.append)
    assert str(path) in lines[0]
    assert "all under 1e-09" in lines[-1]
    assert not any("TOO LARGE" in line for line in lines)
    groups = set(verify(path))
    assert {"embeddings joint", "margins", "effects", "weights", "generic loss", "specific loss", "BPR", "L2", "total", "gradients"} <= groups
    assert len(lines) == len(groups) + 2


@pytest.mark.parametrize("key", OUTPUTS)
def test_vbpr_any_number_a_millionth_off_is_noticed(altered, key):
    path = altered(FILES[0], **{key: perturbed(FILES[0], key)})
    assert max(verify(path).values()) > TOLERANCE
    lines = []
    assert not report(path, lines.append)
    assert sum("TOO LARGE" in line for line in lines) == 1
    assert "NOT all under" in lines[-1]


@pytest.mark.parametrize("key", SAMPLE)
def test_mmgcn_a_number_a_millionth_off_is_noticed(altered, key):
    path = altered(FILES[1], **{key: perturbed(FILES[1], key)})
    assert max(verify(path).values()) > TOLERANCE


def test_a_published_adjacency_that_differs_is_noticed(altered):
    key = "input.adj_row_normalised_with_self_loops"
    path = altered(FILES[1], **{key: perturbed(FILES[1], key)})
    assert max(verify(path).values()) > TOLERANCE


def test_a_missing_interaction_is_noticed(altered):
    with np.load(FILES[1]) as archive:
        matrix = archive["input.interactions"].copy()
    matrix[tuple(np.argwhere(matrix)[0])] = 0
    assert max(verify(altered(FILES[1], **{"input.interactions": matrix})).values()) > TOLERANCE


@pytest.mark.parametrize("key", ["out.effect_text", "grad.user_embedding.weight", "student.item_embedding.weight", "const.kl"])
def test_nan_is_infinitely_wrong(altered, key):
    with np.load(FILES[0]) as archive:
        array = archive[key].astype(np.float64)
    array.reshape(-1)[0] = np.nan
    path = altered(FILES[0], **{key: array})
    assert max(verify(path).values()) == float("inf")
    assert not report(path, lambda line: None)


def test_another_shape_is_infinitely_wrong(altered):
    with np.load(FILES[0]) as archive:
        array = archive["out.effect_text"][:1]
    assert max(verify(altered(FILES[0], **{"out.effect_text": array})).values()) == float("inf")


@pytest.mark.parametrize(
    "key", ["out.loss", "const.decay", "input.users", "input.interactions", "student.text_trs.bias", "grad.text_trs.bias", "joint.user_emb"]
)
def test_a_missing_key_is_named(altered, refuses, key):
    path = altered(FILES[0], **{key: None})
    refuses(DataError, lambda: verify(path), path, key)


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("student.text_trs.weight", np.zeros((2, 3))),
        ("student.user_embedding.weight", np.zeros(4)),
        ("input.interactions", np.zeros(9)),
        ("input.interactions", np.zeros((9, 12))),
        ("input.users", np.full(32, 999)),
        ("input.users", np.full(32, -1)),
        ("input.users", np.zeros((3, 3))),
        ("input.kd_users", np.array(["a"] * 40)),
        ("input.image_feats", np.array([["a"] * 6] * 13)),
        ("student.text_trs.bias", np.array(["a"] * 4)),
        ("const.kd_ratio", np.zeros(2)),
        ("out.loss", np.array("a")),
    ],
    ids=lambda value: f"{value.shape}{value.dtype.kind}" if isinstance(value, np.ndarray) else value,
)
def test_numbers_that_cannot_be_used_are_refused_in_words(altered, refuses, key, array):
    path = altered(FILES[0], **{key: array})
    refuses(DataError, lambda: verify(path), path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -100])
def test_a_truncated_archive(tmp_path, refuses, keep):
    path = tmp_path / "cut.npz"
    path.write_bytes(FILES[0].read_bytes()[:keep])
    refuses(DataError, lambda: verify(path), path)


def test_damage_inside_the_archive(tmp_path, refuses):
    data = bytearray(FILES[0].read_bytes())
    with zipfile.ZipFile(FILES[0]) as archive:
        entry = archive.getinfo("out.loss.npy")
    data[entry.header_offset + 80 :][:20] = b""
    data[entry.header_offset + 100] ^= 0xFF
    path = tmp_path / "damaged.npz"
    path.write_bytes(bytes(data))
    refuses(DataError, lambda: verify(path), path)


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_objects_are_never_unpickled(altered, tmp_path, refuses):
    trace = tmp_path / "unpickled"
    path = altered(FILES[0], **{"out.loss": np.array(Bomb(trace), dtype=object)})
    refuses(DataError, lambda: verify(path), path)
    assert not trace.exists()


def test_a_single_array_is_no_archive(tmp_path, refuses):
    path = tmp_path / "single.npy"
    np.save(path, np.zeros(3))
    refuses(DataError, lambda: verify(path), path, "single array")


def test_no_file(tmp_path, refuses):
    refuses(DataError, lambda: verify(tmp_path / "none.npz"), tmp_path / "none.npz", "does not exist")
    (tmp_path / "text.npz").write_text("hello")
    refuses(DataError, lambda: verify(tmp_path / "text.npz"), tmp_path / "text.npz")


def test_relative_error():
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.array([0.25, 0.0]), np.zeros(2)) == 0.25
    assert relative_error(np.zeros(2), np.zeros(3)) == float("inf")
    assert relative_error(np.array([np.nan, 0.0]), np.ones(2)) == float("inf")
    assert relative_error(np.ones(2), np.array([np.nan, 1.0])) == float("inf")
