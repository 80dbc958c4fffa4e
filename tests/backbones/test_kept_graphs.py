"""Frozen item graphs on disk: what is read is what a search would find, and a search happens once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ckd_fed.backbones import item_graph, kept_graphs
from ckd_fed.backbones.item_graph import frozen_nearest, nearest
from ckd_fed.backbones.kept_graphs import graphs_kept_in
from ckd_fed.config import resolve
from ckd_fed.training.build import build_trainer
from clients.node import Node

N, K = 23, 4


@pytest.fixture
def searches(monkeypatch):
    """What was searched for, where every graph is worth a file."""
    done = []

    def search(x, k, *present):
        if present:  # else it is the part of a search among those present
            done.append((x, k))
        return nearest(x, k, *present)

    monkeypatch.setattr(item_graph, "_WORTH_A_FILE", 0)
    monkeypatch.setattr(item_graph, "nearest", search)
    item_graph._frozen.clear()
    yield done
    item_graph._frozen.clear()


@pytest.fixture
def found(searches, tmp_path):
    """The graph of some features as a new process finds it."""

    def find(x, k=K, present=None):
        item_graph._frozen.clear()
        with graphs_kept_in(tmp_path / "nearest"):
            graph = frozen_nearest(x, k, present)
        fresh = nearest(x, k, present)
        assert graph.index.equal(fresh.index)
        assert graph.weight.equal(fresh.weight)
        assert graph.weight.dtype == x.dtype
        return graph

    return find


def draw(seed=0, n=N, dtype=torch.float32):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def files(folder):
    return sorted(folder.glob("nearest/*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, K, 100])
def test_what_is_read_is_what_a_search_finds(dtype, k, found, searches, tmp_path):
    present = torch.arange(N) % 3 > 0
    for mask in (None, present):
        for _ in range(2):
            found(draw(dtype=dtype), k, mask)
    assert len(searches) == len(files(tmp_path)) == 2


def test_other_features_neighbours_and_masks_are_other_graphs(found, searches, tmp_path):
    found(draw())
    found(draw(seed=1))
    found(draw(), K + 1)
    found(draw(dtype=torch.float64))
    found(draw(), K, torch.arange(N) > 0)
    assert len(searches) == len(files(tmp_path)) == 5


def test_a_search_that_changed_finds_no_old_graph(found, searches, monkeypatch):
    found(draw())
    monkeypatch.setattr(item_graph, "_SEARCH", "nearest-of-tomorrow")
    found(draw())
    assert len(searches) == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def rewritten(**changes):
    """Another file of the same form under the name: its arrays changed, with and without what it says of itself."""

    def change(path):
        arrays = load_file(path) | {name: make() for name, make in changes.items()}
        index, weight = (torch.from_numpy(arrays[part]) for part in ("index", "weight"))
        kept_graphs.save_checkpoint(path, arrays, kept_graphs._state(path.stem, index, weight))

    return change


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "text": lambda path: path.write_text("nothing of the kind"),
    "a bit": flip,
    "another file's": lambda path: save_file({"index": np.zeros((N, K), np.int64), "weight": np.ones((N, K), np.float32)}, path),
    "other arrays": lambda path: save_file({"weight": np.ones((N, K), np.float32)}, path),
    "too many items": rewritten(index=lambda: np.full((N, K), N)),
    "negative": rewritten(index=lambda: np.full((N, K), -1)),
    "fewer neighbours": rewritten(index=lambda: np.zeros((N, K - 1), np.int64), weight=lambda: np.ones((N, K - 1), np.float32)),
    "wider numbers": rewritten(weight=lambda: np.ones((N, K))),
    "narrower numbers": rewritten(index=lambda: np.zeros((N, K), np.int32)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_searched_for_again_and_written_anew(damage, found, searches, tmp_path):
    found(draw())
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    DAMAGES[damage](path)
    assert path.read_bytes() != whole
    found(draw())
    assert path.read_bytes() == whole
    found(draw())
    assert len(searches) == 2


def test_the_graph_of_another_name_is_not_taken(found, searches, tmp_path):
    found(draw())
    (one,) = files(tmp_path)
    found(draw(seed=1))
    (two,) = set(files(tmp_path)) - {one}
    two.write_bytes(one.read_bytes())
    found(draw(seed=1))
    assert len(searches) == 3


def test_the_files_are_few_and_those_used_longest_ago_go(found, searches, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_graphs, "_FILES", 3)
    for seed in range(3):
        found(draw(seed))
        for path in files(tmp_path):
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    found(draw(0))  # used again
    found(draw(3))
    assert len(files(tmp_path)) == 3
    before = len(searches)
    found(draw(0))
    assert len(searches) == before
    found(draw(1))
    assert len(searches) == before + 1


def test_small_graphs_are_not_written(found, searches, tmp_path, monkeypatch):
    monkeypatch.setattr(item_graph, "_WORTH_A_FILE", N * N * 5 + 1)
    found(draw())
    found(draw())
    assert len(searches) == 2
    assert not files(tmp_path)


def test_without_a_folder_nothing_is_written(searches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frozen_nearest(draw(), K)
    assert len(searches) == 1
    assert not list(tmp_path.rglob("*"))


def test_a_folder_that_cannot_be_written_to_is_no_reason_to_stop(found, searches, tmp_path):
    (tmp_path / "nearest").write_text("a file where the folder should be")
    found(draw())
    assert len(searches) == 1


@pytest.mark.parametrize("backbone", ["freedom", "lattice", "micro", "mgcn"])
def test_a_node_searches_once_for_all_its_processes(backbone, searches, tmp_path, write_dataset):
    """Every message of a deployment is handled by a fresh process."""
    folder = write_dataset("toy", n_users=20, n_items=30)
    config = resolve({"dataset": "toy", "backbone": backbone, "model.embedding-dim": 4})
    node = Node(config, {"role": "student", "data-dir": str(folder), "home": str(tmp_path / "home")})
    parameters = []
    for _ in range(2):
        item_graph._frozen.clear()
        parameters.append(dict(node.fresh("student/0").trainer.backbone.named_buffers()))
    assert len(searches) == 2  # image and text
    assert len(files(tmp_path / "home" / "cache")) == 2
    assert all(parameters[0][name].equal(parameters[1][name]) for name in parameters[0])


SECOND = """
import sys
from pathlib import Path
from ckd_fed.backbones import item_graph
from ckd_fed.config import resolve
from ckd_fed.data.locate import open_dataset
from ckd_fed.training.build import build_trainer

def search(*arguments):
    raise SystemExit("searched again")

item_graph._WORTH_A_FILE, item_graph.nearest = 0, search
config = resolve({"dataset": "toy", "backbone": "freedom", "model.embedding-dim": 4, "data.dir": sys.argv[1]})
build_trainer(config, open_dataset(config), "student", cache=Path(sys.argv[2]))
"""


def test_a_second_process_does_not_search_again(searches, tmp_path, write_dataset):
    from ckd_fed.data.locate import open_dataset

    folder = write_dataset("toy", n_users=20, n_items=30)
    config = resolve({"dataset": "toy", "backbone": "freedom", "model.embedding-dim": 4, "data.dir": str(folder)})
    build_trainer(config, open_dataset(config), "student", cache=tmp_path / "cache")
    assert len(searches) == 2
    environment = {**os.environ, "PYTHONPATH": str(Path(item_graph.__file__).parents[2])}
    for cache, code in ((tmp_path / "cache", 0), (tmp_path / "another", 1)):
        done = subprocess.run([sys.executable, "-c", SECOND, str(folder), str(cache)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
