"""Measurements of a dataset against naive ones, and the warnings against planted faults."""

import numpy as np
import pytest

from ckd_fed.cli import main
from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.inspect import describe, histogram, inspect
from ckd_fed.data.plot import plot_report
from ckd_fed.data.signal import Signal, _error, content_signal


@pytest.fixture
def planted(tmp_path, write_splits):
    """Users choose items of one of five kinds; 'text' shows the kind, 'noise' does not."""
    rng = np.random.default_rng(0)
    directory = tmp_path / "planted"
    directory.mkdir()
    kind = np.arange(100) % 5
    tables = {split: {} for split in ("train", "val", "test")}
    for user in range(150):
        items = rng.permutation(np.flatnonzero(kind == user % 5))
        tables["train"][user] = [*items[:6], 99] if user == 4 else items[:6]
        tables["val"][user], tables["test"][user] = items[6:8], items[8:9]
    for user in range(150):
        for split in ("val", "test"):
            tables[split][user] = [item for item in tables[split][user] if item not in tables["train"][user]]
    tables = {split: {user: sorted(set(map(int, row))) for user, row in table.items()} for split, table in tables.items()}
    write_splits(directory, **tables)
    np.save(directory / "text_feat.npy", (np.eye(5)[kind] + rng.normal(0, 0.1, (100, 5))).astype(np.float32))
    np.save(directory / "noise_feat.npy", rng.normal(size=(100, 5)).astype(np.float32))
    return directory


def naive_recall(dataset, modality):
    features = dataset.features[modality].astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    recalls = []
    for user in range(dataset.n_users):
        train = dataset.train.items[dataset.train.indptr[user] : dataset.train.indptr[user + 1]]
        val = dataset.val.items[dataset.val.indptr[user] : dataset.val.indptr[user + 1]]
        if len(train) and len(val):
            score = {item: np.mean([unit[item] @ unit[other] for other in train]) for item in range(dataset.n_items) if item not in train}
            recalls.append(len(set(sorted(score, key=score.__getitem__)[-20:]) & set(val)) / len(val))
    return np.mean(recalls)


def test_signal_is_the_naive_recall_and_tells_content_from_noise(planted):
    dataset = load_dataset(planted)
    text, noise = content_signal(dataset, "text"), content_signal(dataset, "noise")
    assert text.recall == pytest.approx(naive_recall(dataset, "text"))
    assert noise.recall == pytest.approx(naive_recall(dataset, "noise"))
    assert text.recall > 0.9
    assert text.carries
    assert not noise.carries
    assert text.shuffled == pytest.approx(20 / 94, abs=0.05)
    assert text.users == 150
    assert content_signal(dataset, "text", max_users=10).users == 10


def test_no_signal_without_users_to_rank(write_dataset, write_splits):
    directory = write_dataset(n_users=3, n_items=20)
    write_splits(directory, train={0: [1, 2]}, val={1: [3]}, test={2: [19]})
    assert content_signal(load_dataset(directory), "image") is None
    assert describe(inspect(load_dataset(directory)))


def test_error_of_the_signal_is_that_of_the_paired_difference_and_of_the_deals():
    rng = np.random.default_rng(0)
    recalls, shuffled = rng.random(30), rng.random((3, 30))
    differences, deals = recalls - shuffled.mean(axis=0), shuffled.mean(axis=1)
    assert _error(recalls, shuffled) == pytest.approx(np.hypot(np.std(differences, ddof=1) / 30**0.5, np.std(deals, ddof=1) / 3**0.5))
    assert _error(shuffled[0], np.stack([shuffled[0]] * 3)) == pytest.approx(0, abs=1e-12)  # users differ, but by the same with any features
    assert np.isnan(_error(recalls[:1], shuffled[:, :1]))
    assert np.isnan(_error(recalls, shuffled[:1]))


def test_error_of_the_signal_is_the_deviation_over_draws():
    """Of users and deals together, with a part that all users of a deal share."""
    rng = np.random.default_rng(0)
    errors, found = [], []
    for _ in range(2000):
        own, deal = rng.normal(size=40), rng.normal(0, 0.3, (3, 1))
        recalls, shuffled = own + rng.normal(0, 0.5, 40), own + deal + rng.normal(0, 0.5, (3, 40))
        errors.append(_error(recalls, shuffled) ** 2)
        found.append((recalls - shuffled).mean())
    assert np.mean(errors) ** 0.5 == pytest.approx(np.std(found), rel=0.08)


def test_one_user_is_no_signal(write_dataset, write_splits):
    directory = write_dataset(n_users=2, n_items=60)
    write_splits(directory, train={0: [1, 2]}, val={0: [3]}, test={1: [59]})
    features = np.ones((60, 4), np.float32) * np.where(np.arange(60) < 4, 1, -1)[:, None]
    np.save(directory / "image_feat.npy", features)
    report = inspect(load_dataset(directory))
    signal = report.modalities["image"].signal
    assert (signal.recall, signal.users, signal.carries) == (1, 1, False)
    assert np.isnan(signal.error)
    assert "image: whether it carries a signal cannot be told from one user with training and validation items" in report.warnings
    assert any(line.startswith("  signal: recall@20 of its nearest items 1.0000") and line.endswith(", 1 user") for line in describe(report))
    assert "nan" not in "\n".join(describe(report))
    plot_report(report, directory / "plot.png")  # without the error bar


def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_measured(planted, tmp_path, capsys):
    for plot, mention in ((tmp_path / "a.bad", ".bad is no format"), (tmp_path / "no" / "a.png", "does not exist")):
        with pytest.raises(SystemExit):
            main(["data", "inspect", str(planted), "--plot", str(plot)])
        caught = capsys.readouterr()
        assert mention in caught.err
        assert caught.out == ""


def test_a_signal_is_beyond_two_standard_errors():
    assert Signal(0.3, 0.1, 0.09, 50).carries
    assert not Signal(0.3, 0.1, 0.11, 50).carries


def test_measurements(planted):
    report = inspect(load_dataset(planted))
    text = np.load(planted / "text_feat.npy").astype(np.float64)
    one = report.modalities["text"]
    assert (one.dimension, one.dtype, one.missing, one.zero, one.duplicate, one.constant) == (5, "float32", 0, 0, 0, 0)
    assert one.mean == pytest.approx(text.mean())
    assert one.std == pytest.approx(text.std())
    assert one.norm == pytest.approx(np.linalg.norm(text, axis=1).mean())
    assert one.off_centre == pytest.approx(np.linalg.norm(text.mean(0)) / one.norm)
    assert (one.widest, one.widest_share) == (text.var(0).argmax(), pytest.approx(text.var(0).max() / text.var(0).sum()))
    assert report.interactions == sum(len(getattr(report.dataset, s)) for s in ("train", "val", "test"))
    assert report.sparsity == pytest.approx(1 - report.interactions / 15_000)
    assert report.item_degree.sum() == report.user_degree.sum() == len(report.dataset.train)
    assert [w for w in report.warnings if not w.startswith(("noise: cannot be told", "there is no manifest"))] == []


def test_measurements_are_of_the_items_that_have_the_modality(planted):
    text = np.load(planted / "text_feat.npy")
    text[:30] = 1e6
    np.save(planted / "text_feat.npy", text)
    np.save(planted / "text_mask.npy", np.arange(100) >= 30)
    one = inspect(load_dataset(planted)).modalities["text"]
    assert (one.missing, one.most_alike) == (30, 1)
    assert one.mean == pytest.approx(text[30:].astype(np.float64).mean())
    assert one.std == pytest.approx(text[30:].astype(np.float64).std())


def change(planted, edit):
    text = np.load(planted / "text_feat.npy")
    np.save(planted / "text_feat.npy", edit(text))
    return inspect(load_dataset(planted)).warnings


def fill(rows, value):
    def edit(text):
        text[rows] = text[~np.isin(np.arange(100), rows)].mean(axis=0) if value is None else value
        return text

    return edit


@pytest.mark.parametrize(("edit", "mention"), [
    (fill(np.arange(7), 0), "text: 7 items have a row of zeros"),
    (fill(np.arange(9), None), "text: 9 items have one and the same row, the mean of the others"),
    (fill(np.arange(9), 3), "text: 9 items have one and the same row, perhaps a filler"),
    (lambda text: text[np.arange(100) % 85], "text: 15 rows repeat"),
    (lambda text: text + 20, "text: not centred"),
    (lambda text: np.column_stack([text, np.ones((100, 2))]), "text: 2 of 7 columns are constant"),
    (lambda text: np.column_stack([np.arange(100), text]), "text: column 0 holds 100% of the variance of all 6"),
    (lambda text: np.roll(text, 1, axis=0)[np.random.default_rng(3).permutation(100)], "text: cannot be told from shuffled"),
    (lambda text: text * 100, "rows of text are"),
])  # fmt: skip
def test_warnings_of_planted_faults(planted, edit, mention):
    assert not any(mention in warning for warning in change(planted, lambda text: text))
    assert [warning for warning in change(planted, edit) if mention in warning]


def test_warnings_about_the_split(write_dataset, write_splits):
    directory = write_dataset(n_users=4, n_items=20)
    write_splits(directory, train={0: [1, 2], 1: [3]}, val={0: [5], 2: [6]}, test={3: [1, 19]})
    warnings = inspect(load_dataset(directory)).warnings
    assert any(w.startswith("2 users have no training item") for w in warnings)
    assert any(w.startswith("17 items are never trained; 3 of 4 val and test") for w in warnings)
    assert any("only 2 users have a val item" in w for w in warnings)


def test_histogram():
    assert histogram(np.array([0, 1, 1, 2, 3, 4, 5, 9, 10])) == [("0", 1), ("1", 2), ("2", 1), ("3-4", 2), ("5-9", 2), ("10-19", 1)]
    assert histogram(np.array([1000, 99_999]))[-1] == ("1000+", 2)


def test_rows_of_unit_length_can_be_drawn(write_dataset, tmp_path):
    """As encoders give them, and as a transform of this package does: they differ by float32's rounding alone."""
    directory = write_dataset(n_users=30, n_items=200)
    for path in directory.glob("*_feat.npy"):
        rows = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
        np.save(path, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    main(["data", "inspect", str(directory), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(planted, tmp_path, capsys):
    main(["data", "inspect", str(planted), "--plot", str(tmp_path / "plot.png")])
    out = capsys.readouterr().out
    assert "150 users, 100 items" in out
    assert "training items of a user: 6 to 7" in out or "training items of a user: 6 to 6" in out
    assert "warning: noise: cannot be told" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    planted.rename(home / "data" / "planted")
    main(["data", "inspect", "planted", "--home", str(home)])
    assert "150 users" in capsys.readouterr().out
    for arguments, mention in (
        (["plantd", "--home", str(home)], "did you mean 'planted'"),
        (["planted", "--home", str(home), "--plot", "x.qqq"], "qqq"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "inspect", *arguments])
        assert mention in capsys.readouterr().err
