"""The stand-in dataset: the same bits everywhere, never half written, and with the imbalance that it promises."""

import hashlib
import json
import multiprocessing
import shutil
import stat

import numpy as np
import pytest

from ckd_fed.config import resolve
from ckd_fed.data.dataset import dense_features, load_dataset
from ckd_fed.data.features import features_fingerprint
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.silos import split_by_modality
from ckd_fed.data.standin import DEFAULT_SEED, MARKER, VERSION, generate_standin
from ckd_fed.errors import DataError

# Of version 1 and the default seed. Where these differ, nodes on two machines would hold different data: fix the generator, not the numbers.
SPLIT = "42d5cb4780fede617cf856013a8965c9f07b4e35dcdd4be23b644953f912d368"
FEATURES = {
    "image": "c81c147a93139255ebbeade8af2ff1be4cc1c1c409aec199aa36fe37bd8c3255",
    "text": "05c4de49945f48c2e247ac08ba278033b507f572e51ee6e71420b960cc88fb1b",
}


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    return load_dataset(generate_standin(tmp_path_factory.mktemp("standin") / "baby-standin"), standin=True)


def contents(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_it_is_the_same_on_every_machine(standin):
    assert standin.fingerprint == SPLIT
    assert {m: features_fingerprint(standin.features[m]) for m in standin.modalities} == FEATURES


def test_another_seed_gives_another_dataset(standin, tmp_path):
    other = load_dataset(generate_standin(tmp_path / "other", DEFAULT_SEED + 1))
    assert other.fingerprint != standin.fingerprint
    assert (other.n_users, other.n_items, other.modalities) == (standin.n_users, standin.n_items, standin.modalities)


def test_it_says_what_it_is(standin):
    assert "GENERATED data, not Amazon Baby" in (standin.directory / "README.txt").read_text()
    assert standin.modalities == ("image", "text")
    assert all(matrix.dtype == np.float16 for matrix in standin.features.values())


def test_every_user_has_all_three_parts_and_every_item_occurs(standin):
    for split in (standin.train, standin.val, standin.test):
        assert (split.degree >= 1).all()
    assert (standin.train.degree + standin.val.degree + standin.test.degree >= 5).all()
    in_training = np.bincount(standin.train.items, minlength=standin.n_items)
    anywhere = in_training + np.bincount(standin.val.items, minlength=standin.n_items) + np.bincount(standin.test.items, minlength=standin.n_items)
    assert (anywhere >= 1).all()
    assert (in_training == 0).mean() < 0.01


@pytest.mark.parametrize("side", ["users", "items"])
def test_popularity_and_activity_have_heavy_tails(standin, side):
    degree = np.sort(standin.train.degree if side == "users" else np.bincount(standin.train.items, minlength=standin.n_items))[::-1]
    assert degree[: len(degree) // 10].sum() > 0.3 * degree.sum()
    assert degree[0] > 8 * np.median(degree)


def test_text_shows_more_of_what_is_chosen_together_than_image_and_image_more_than_chance(standin):
    """Mean co-consumption of items and their 10 nearest neighbours, each pair against what the two items' popularity alone gives."""
    chosen = np.zeros((standin.n_users, standin.n_items))
    chosen[standin.train.row, standin.train.items] = 1
    together = chosen.T @ chosen
    degree = chosen.sum(0)

    def lift(neighbours):
        at = np.arange(standin.n_items)[:, None]
        return together[at, neighbours].sum() / (degree[at] * degree[neighbours] / standin.n_users).sum()

    def nearest(modality):
        x = dense_features(standin, modality).astype(float)
        x -= x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        cosine = x @ x.T
        np.fill_diagonal(cosine, -np.inf)
        return np.argsort(-cosine, axis=1)[:, :10]

    at_random = np.stack([(np.arange(standin.n_items) + shift) % standin.n_items for shift in range(1, 11)], axis=1)
    text, image, chance = lift(nearest("text")), lift(nearest("image")), lift(at_random)
    assert text > 1.1 * image
    assert image > 1.1 * chance


def test_a_complete_standin_is_left_as_it_is(standin):
    before = {path.name: path.stat().st_mtime_ns for path in standin.directory.iterdir()}
    generate_standin(standin.directory)
    assert {path.name: path.stat().st_mtime_ns for path in standin.directory.iterdir()} == before


def test_a_standin_of_an_older_generator_is_replaced(standin, tmp_path):
    directory = generate_standin(tmp_path / "old", DEFAULT_SEED + 1)
    marker = json.loads((directory / MARKER).read_text())
    (directory / MARKER).write_text(json.dumps({**marker, "version": VERSION - 1, "seed": DEFAULT_SEED}))
    assert contents(generate_standin(directory)) == contents(standin.directory)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_standin_that_lost_a_file_is_replaced(standin, tmp_path):
    directory = generate_standin(tmp_path / "torn")
    (directory / "val.json").unlink()
    assert contents(generate_standin(directory)) == contents(standin.directory)


def test_what_no_generator_wrote_is_never_replaced(tmp_path, refuses):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("{}")
    refuses(DataError, lambda: generate_standin(tmp_path / "mine"), "train.json", MARKER)
    assert contents(tmp_path / "mine").keys() == {"train.json"}
    (tmp_path / "file").write_text("")
    refuses(DataError, lambda: generate_standin(tmp_path / "file"), tmp_path / "file")


def test_an_empty_folder_may_be_taken_and_others_can_read_the_result(tmp_path):
    (tmp_path / "empty").mkdir()
    assert load_dataset(generate_standin(tmp_path / "empty"))
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o755


def race(directory, start, found):
    start.wait()
    found.put(load_dataset(generate_standin(directory)).fingerprint)


@pytest.mark.parametrize("outdated", [False, True])
def test_processes_that_race_all_end_with_the_same_complete_dataset(standin, tmp_path, outdated):
    directory = tmp_path / "shared" / "baby-standin"
    if outdated:
        generate_standin(directory, DEFAULT_SEED + 1)
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.SimpleQueue()
    racers = [context.Process(target=race, args=(directory, start, found)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert {found.get() for _ in racers} == {standin.fingerprint}
    assert contents(directory) == contents(standin.directory)
    assert [path.name for path in directory.parent.iterdir()] == ["baby-standin"]


def test_it_is_one_wherever_it_is_named(standin, tmp_path, refuses):
    """By a folder of one's own, and in the silos that were made of it."""
    split_by_modality(standin.directory, tmp_path / "silos")
    for folder, opened in ((standin.directory, None), (tmp_path / "silos/student", None), (tmp_path / "silos/teacher-text", ["text"])):
        found = open_dataset(resolve({"data.dir": str(folder)}, {}), modalities=opened, at_least=1)
        assert found.standin
        assert found.name == "baby (generated stand-in)"
        assert open_dataset(resolve(), {"data-dir": str(folder)}, modalities=opened, at_least=1).standin
        never = resolve({"data.dir": str(folder), "data.standin": "never"}, {})
        refuses(DataError, lambda one=never: open_dataset(one), folder, "stand-in", "data.standin")


def test_of_a_name_of_its_own_it_is_one_too(standin, tmp_path):
    shutil.copytree(standin.directory, tmp_path / "data/copied")
    assert open_dataset(resolve({"dataset": "copied", "home": str(tmp_path)}, {})).standin
