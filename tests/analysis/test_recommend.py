"""Recommendations and exports agree with the student's own scores, view by view."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ckd_fed.analysis.export import export
from ckd_fed.analysis.history import read_history
from ckd_fed.analysis.recommend import IDS, Recommendation, find_user, recommend, seen_items
from ckd_fed.analysis.student import load_student
from ckd_fed.cli import main
from ckd_fed.errors import ConfigError


@pytest.fixture
def trained(runs):
    def load(name="one", **overrides):
        history = read_history(runs(name, **overrides) / name)
        return load_student(history), history

    return load


def scores(student, view):
    """Scores from full tables, ``(n_users, n_items)``: what the views' own definition gives, nothing left out."""
    with torch.no_grad():
        tables = student.backbone.embed([view])[view]
        return (tables.users @ tables.items.T).double().numpy()


@pytest.mark.parametrize("backbone", ["vbpr", "mmgcn"])
@pytest.mark.parametrize("modalities", ["image,text", "image,text,audio"])
def test_items_margins_and_contributions_are_those_of_the_views(backbone, modalities, trained):
    student, _ = trained(backbone=backbone, data__modalities=modalities)
    user, joint = 7, scores(student, student.backbone.joint)
    seen = seen_items(student.dataset)
    order = [item for item in np.argsort(-joint[user], kind="stable") if not seen.contains(np.array([user]), np.array([item]))[0]]
    found = recommend(student, user, 10)
    assert [one.item for one in found] == order[:10]
    for one in found:
        assert one.margin == pytest.approx(joint[user, one.item] - joint[user].mean(), abs=1e-5)
        assert set(one.contributions) == set(modalities.split(","))
        for m, added in one.contributions.items():
            without = scores(student, student.backbone.without(m))
            assert added == pytest.approx(one.margin - (without[user, one.item] - without[user].mean()), abs=1e-5)


def test_who_speaks_for_an_item():
    assert Recommendation(1, 1.0, {"image": 0.2, "text": 0.5}).speaks == "text"
    assert Recommendation(1, 1.0, {"image": -0.2, "text": -0.1}).speaks == IDS


def test_a_list_ends_where_nothing_unseen_is_left(trained):
    student, _ = trained()
    found = recommend(student, 3, 1000)
    seen = seen_items(student.dataset)
    assert len(found) == student.dataset.n_items - seen.degree[3]
    assert not seen.contains(np.array([3]), np.array([one.item for one in found])).any()


def test_users_that_are_not_there_and_empty_lists_are_refused(trained, refuses):
    student, history = trained()
    for user in (-1, 60):
        refuses(ConfigError, lambda user=user: recommend(student, user, 5), f"user is {user}", "0 to 59")
    refuses(ConfigError, lambda: find_user(student.dataset, "60"), "user is '60'", "60 users", "'0'")
    assert find_user(student.dataset, "59") == 59
    refuses(ConfigError, lambda: recommend(student, 0, 0), "k is 0")
    refuses(ConfigError, lambda: export(student, history, history.directory, 0), "k is 0")


def test_an_export_holds_every_view_and_every_users_list(trained, tmp_path):
    student, history = trained()
    embeddings, lists, *_ = export(student, history, tmp_path / "out", 5)
    with safe_open(embeddings, framework="numpy") as file:
        assert set(file.keys()) == {f"{view}/{side}" for view in ("joint", "only/image", "only/text") for side in ("users", "items")}
        users, items = file.get_tensor("joint/users"), file.get_tensor("joint/items")
        assert file.metadata()["split"] == student.dataset.fingerprint
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(60))
    for row in rows:
        assert row["indices"] == [one.item for one in recommend(student, row["index"], 5)]
        np.testing.assert_allclose(row["scores"], users[row["index"]] @ items[row["indices"]].T, atol=1e-5)
        assert (row["user"], row["items"]) == (str(row["index"]), list(map(str, row["indices"])))  # this dataset has no ids of a source


def test_the_commands_speak_the_sources_ids(runs, tmp_path, capsys):
    directory = runs("one") / "one"
    users, items = [f"user é{k}" for k in range(60)], [str(100 + k) for k in range(40)]  # item 3 is "103", not "3"
    for name, ids in (("users.json", users), ("items.json", items)):
        (tmp_path / "data" / "toy" / name).write_text(json.dumps(ids))
    student = load_student(read_history(directory))
    expected = [one.item for one in recommend(student, 4, 3)]
    capsys.readouterr()
    main(["recommend", "one", "--user", "user é4", "--k", "3", "--json"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["item"], row["index"]) for row in shown] == [(items[k], k) for k in expected]
    main(["recommend", "one", "--user", "user é4", "--k", "3"])
    table = capsys.readouterr().out
    assert all(f" {row['item']} " in table for row in shown)
    with pytest.raises(SystemExit):
        main(["recommend", "one", "--user", "4"])
    assert "user is '4'; toy has 60 users with ids such as 'user é0'" in capsys.readouterr().err
    main(["export", "one", "--k", "3"])
    names = ("embeddings.safetensors", "top_items.jsonl", "users.json", "items.json")
    written = [directory / "export" / name for name in names]
    assert capsys.readouterr().out.split() == list(map(str, written))
    row = json.loads(written[1].read_text().splitlines()[4])
    assert (row["user"], row["index"], row["items"], row["indices"]) == ("user é4", 4, [items[k] for k in expected], expected)
    assert [json.loads(path.read_text()) for path in written[2:]] == [users, items]


def test_ids_are_printed_whole_and_as_they_are(runs, tmp_path, capsys):
    """Neither read as markup nor cut."""
    runs("one")
    items = [f"[/{k}] red[new]shirt 3f2a9c81-77aa-4b1c-9e0d-{k:012d}" for k in range(40)]
    for name, ids in (("users.json", [f"[b]{k}" for k in range(60)]), ("items.json", items)):
        (tmp_path / "data" / "toy" / name).write_text(json.dumps(ids))
    capsys.readouterr()
    main(["recommend", "one", "--user", "[b]4", "--k", "2", "--json"])
    expected = [json.loads(line)["item"] for line in capsys.readouterr().out.splitlines()]
    main(["recommend", "one", "--user", "[b]4", "--k", "2"])
    out = capsys.readouterr().out
    assert "user [b]4" in out
    column = "".join(line.split("│")[2].strip() for line in out.splitlines() if line.count("│") > 3)  # an id folds at its blanks
    assert column.replace(" ", "") == "".join(expected).replace(" ", "")


def test_a_student_of_a_gpu_is_used_where_there_is_none(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    directory = runs("one") / "one"
    stored = directory / "config.yaml"
    assert "device: auto" in stored.read_text()
    stored.write_text(stored.read_text().replace("device: auto", "device: cuda:1"))
    assert next(load_student(read_history(directory)).backbone.parameters()).device.type == "cpu"
