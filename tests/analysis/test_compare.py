"""Runs listed, found again and compared user by user."""

import io
import json
import warnings

import numpy as np
import pytest
from scipy import stats

from ckd_fed.analysis.compare import Entry, compare, holm, paired, read_entry
from ckd_fed.analysis.history import read_history
from ckd_fed.analysis.student import load_student
from ckd_fed.analysis.users import UserTable, load_users, user_table
from ckd_fed.cli import main
from ckd_fed.errors import ConfigError, DataError
from ckd_fed.evaluation.tested import UserTest
from ckd_fed.report.comparison import draw_comparison
from ckd_fed.tracking.record import read_rows


def test_the_users_file_holds_what_the_final_row_averages(runs):
    folder = runs("one") / "one"
    table, final = load_users(folder / "test_users.npz"), read_rows(folder / "metrics.jsonl")[-1]
    assert {name.rpartition("/")[0] for name in table.values} == {"teacher/image", "teacher/text", "plain", "student"}
    for name, values in table.values.items():
        model, _, metric = name.rpartition("/")
        assert values.mean() == pytest.approx(final[f"final/{model}/test/{metric}"], abs=1e-6)
    assert read_rows(folder / "metrics.jsonl")[-2]["event"] == "groups"


def test_a_run_without_the_file_is_tested_again_from_its_best_student(runs):
    """As a federated run is, whose server has no data."""
    file = runs("one") / "one" / "test_users.npz"
    before = load_users(file)
    file.unlink()
    entry = read_entry("one")
    np.testing.assert_allclose(entry.values("recall@20"), before.values["student/recall@20"], atol=1e-7)
    assert load_users(file).split == before.split


def test_difference_interval_and_p_are_those_of_scipy():
    rng = np.random.default_rng(0)
    base, values = rng.random(50), rng.random(50) + 0.1
    mean, low, high, p = paired(values, base)
    expected = stats.ttest_rel(values, base)
    assert (mean, p) == pytest.approx((float((values - base).mean()), float(expected.pvalue)))
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert paired(base, base) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("value", [0.1, 0.6])
def test_one_user_tells_no_interval_and_no_p(value):
    mean, *rest = paired(np.array([value]), np.array([0.1]))
    assert mean == pytest.approx(value - 0.1)
    assert np.isnan(rest).all()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    nan = float("nan")
    np.testing.assert_array_equal(holm([nan, 0.01, nan, 0.04]), [nan, 0.02, nan, 0.04])  # what was not tested does not count
    np.testing.assert_array_equal(holm([nan]), [nan])


def test_a_model_against_another_of_the_same_run(runs):
    runs("one", "two")
    found = compare([read_entry(name) for name in ("one:plain", "one", "two:teacher/text")], "ndcg@10")
    assert [entry.label for entry in found] == ["one:plain", "one", "two:teacher/text"]
    assert found[1].mean - found[0].mean == pytest.approx(found[1].difference)
    assert found[1].low <= found[1].difference <= found[1].high
    assert all(entry.n == 60 for entry in found)


def test_what_cannot_be_compared_is_said(runs, tmp_path, write_dataset, refuses):
    runs("one")
    other = write_dataset("other", n_users=50, n_items=40, seed=5)
    runs("two", data__dir=str(other))
    refuses(DataError, lambda: compare([read_entry("one"), read_entry("two")], "recall@20"), "different splits", "two", "one")
    refuses(ConfigError, lambda: read_entry("one:plian"), "did you mean 'plain'")
    refuses(ConfigError, lambda: read_entry("one").values("recall@5"), "recall@5", "choices")
    refuses(DataError, lambda: read_entry("three"), "unknown run 'three'", "one, two")
    file = tmp_path / "runs" / "one" / "test_users.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    refuses(DataError, lambda: read_entry("one"), "damaged", file)
    refused = set()
    for at in range(0, len(whole), 97):  # anywhere in the archive: names, compressed numbers, lists
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            load_users(file)
        except DataError as error:
            refused.add(str(error).partition(": ")[2].split()[0])
    assert len(refused) > 1
    file.unlink()
    (tmp_path / "runs" / "one" / "checkpoints" / "best.safetensors").unlink()
    refuses(DataError, lambda: read_entry("one"), "best.safetensors")


def test_another_split_in_the_place_of_the_runs_own_is_told(runs, tmp_path, write_dataset, refuses):
    import shutil

    file = runs("one") / "one" / "test_users.npz"
    file.unlink()
    shutil.rmtree(tmp_path / "data" / "toy")
    write_dataset("data/toy", n_users=60, n_items=40, seed=9)
    refuses(DataError, lambda: read_entry("one"), "another split")


def test_other_features_in_the_place_of_the_runs_own_are_told(runs, tmp_path, refuses):
    """Loading is what recommend and export do too; nothing is tested or kept on features that the student never saw."""
    file, path = runs("one") / "one" / "test_users.npz", tmp_path / "data" / "toy" / "text_feat.npy"
    file.unlink()
    features = np.load(path)
    np.save(path, features[::-1])
    for load in (lambda: read_entry("one"), lambda: load_student(read_history(tmp_path / "runs" / "one"))):
        refuses(DataError, load, "run one was trained on other text features", path.parent, "put the run's own data there")
    np.save(path, features)
    np.save(path.with_name("image_mask.npy"), np.arange(40) != 3)
    refuses(DataError, lambda: read_entry("one"), "another image mask (none)")
    assert not file.exists()
    path.with_name("image_mask.npy").unlink()
    np.save(path.with_name("audio_feat.npy"), features)  # which the run does not use
    read_entry("one")


def test_names_are_printed_as_they_are(runs, capsys):
    """What looks like markup in them is none, nor is it mathematics to a figure or hidden from its legend."""
    runs("try[alpha]", "[b]bold", "$a_$", "_x")
    capsys.readouterr()
    main(["runs"])
    main(["compare", "[b]bold", "try[alpha]"])
    out = capsys.readouterr().out
    entries = [read_entry(name) for name in ("$a_$", "_x", "[b]bold")]
    drawn = draw_comparison(entries, compare(entries, "recall@20"), "recall@20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a sign that the font lacks, for example
        drawn.savefig(io.BytesIO(), format="png")
    named = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
    assert [name.replace("\\$", "$").lstrip("\u200b") for name in named] == ["$a_$", "_x", "[b]bold"]
    assert out.count("try[alpha]") == out.count("[b]bold") == 2


def test_of_one_user_the_difference_alone_is_shown(runs, tmp_path, capsys):
    folder = runs("one")
    file = folder / "one" / "test_users.npz"
    table = load_users(file)
    UserTable(table.split, table.users[:1], {name: values[:1] for name, values in table.values.items()}).save(file)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        main(["compare", "one:plain", "one", "one:teacher/text", "--plot", str(tmp_path / "out.png")])
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["one:plain", "one", "one:teacher/text"]
    assert all(row[1] and row[3:] == ["", "", ""] for row in rows)
    assert all(row[2] for row in rows[1:])
    assert "nan" not in shown.replace(str(tmp_path), "")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("events", "state"), [
    (["failed"], "failed"), (["failed", "resume"], "unfinished"), (["failed", "resume", "failed"], "failed"),
    (["failed", "resume", "final"], "finished"),
])  # fmt: skip
def test_a_run_that_is_gone_on_with_has_not_failed(events, state, runs):
    directory = runs("one") / "one"
    rows = read_rows(directory / "metrics.jsonl")
    kept = [row for row in rows if row["event"] != "final"] + [rows[-1] if event == "final" else {"event": event, "time": 0.0} for event in events]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert read_history(directory).state == state


def test_the_commands(runs, tmp_path, capsys):
    folder = runs("one", "two")
    (folder / "broken").mkdir()
    (folder / "broken" / "metrics.jsonl").write_text("nonsense\n")
    capsys.readouterr()
    main(["runs"])
    listed = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:]] for line in capsys.readouterr().out.splitlines() if "│" in line
    }
    final = read_rows(folder / "one" / "metrics.jsonl")[-1]
    assert listed["one"][:5] == [
        "toy",
        "vbpr",
        "finished",
        f"{final['final/student/val/recall@20']:.4f}",
        f"{final['final/student/test/recall@20']:.4f}",
    ]
    assert listed["broken"][2] == "damaged"
    main(["compare", "one:plain", "one", "two", "--plot", str(tmp_path / "out.png")])
    shown = capsys.readouterr().out
    assert f"{final['final/plain/test/recall@20']:.4f}" in shown
    assert "p (Holm)" in shown
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["compare", "one"])
    assert "at least two runs" in capsys.readouterr().err


def test_users_who_all_gain_alike():
    assert paired(np.array([1.5, 2.5]), np.array([1.0, 2.0])) == (0.5, 0.5, 0.5, 0.0)


def test_every_entry_has_its_own_adjusted_p():
    rng = np.random.default_rng(0)
    base = rng.random(40)
    columns = {"base": base, "far": base + 0.5 + 0.1 * rng.random(40), "near": base + 0.02 * rng.normal(size=40)}
    entries = [Entry(name, None, "student", UserTable("s", np.arange(40), {"student/recall@20": v})) for name, v in columns.items()]
    found = {one.label: one for one in compare(entries, "recall@20")}
    assert found["far"].p_holm == pytest.approx(2 * found["far"].p)
    assert found["near"].p_holm == pytest.approx(found["near"].p)
    assert found["far"].mean == pytest.approx(columns["far"].mean())
    assert found["far"].difference > 0.5


def test_models_tested_on_different_users_make_no_table():
    one, two = (UserTest(np.array(users), {"recall@20": np.zeros(2)}, []) for users in ([0, 1], [0, 2]))
    with pytest.raises(DataError, match="plain and student were tested on different users"):
        user_table("s", {"plain": one, "student": two})
