"""What only MMGCN promises: branches, written out on a dense matrix, and averaged."""

import numpy as np
import pytest
import torch
from torch.nn.functional import leaky_relu

from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.graph import row_normalised_adjacency


@pytest.fixture
def train(random_interactions):
    return random_interactions(8, 12, low=0)


@pytest.fixture
def build(train, random_features):
    def make(n_modalities):
        return build_backbone("mmgcn", train, random_features(12, n_modalities), {"embedding_dim": 4}, seed=0, dtype=torch.float64)

    return make


def branch_by_hand(state, modality, features, adjacency):
    """The branch of a present modality in plain matrix products."""
    x = torch.cat([state[f"preference.{modality}"], features @ state[f"projection.{modality}.weight"].T + state[f"projection.{modality}.bias"]])
    x = x / x.norm(dim=1, keepdim=True)
    ids = torch.cat([state["user_embedding"], state["item_embedding"]])

    def linear(kind, layer, value):
        key = f"branch.{modality}.{kind}.{layer}"
        return value @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    for layer in range(3):
        h = leaky_relu(adjacency @ linear("conv", layer, x), 0.01)
        x = leaky_relu(linear("gate", layer, h) + leaky_relu(linear("linear", layer, x), 0.01) + ids, 0.01)
    return x


def test_joint_embeddings_are_the_mean_of_the_branches(build, train, random_features):
    model, features = build(3), random_features(12, 3)
    adjacency = torch.from_numpy(row_normalised_adjacency(train).toarray())
    expected = sum(branch_by_hand(model.state_dict(), m, torch.from_numpy(x), adjacency) for m, x in features.items()) / 3
    users, items = model.embed([model.joint])[model.joint]
    torch.testing.assert_close(torch.cat([users, items]), expected, rtol=1e-12, atol=1e-12)


def test_a_teacher_is_its_modalitys_branch(build):
    student, teacher = build(3), build(1)
    teacher.load_state_dict({key: value for key, value in student.state_dict().items() if key in teacher.state_dict()})
    users, items = teacher.embed([teacher.joint])[teacher.joint]
    states, branch = student.branches([student.joint])["image"]
    assert states == [True]
    torch.testing.assert_close(torch.cat([users, items]), branch[:, 0], rtol=1e-12, atol=1e-12)


def test_branches_are_computed_only_where_needed(build):
    model = build(3)

    def states(views):
        return {m: states for m, (states, _) in model.branches(views).items()}

    assert states([model.joint]) == {m: [True] for m in model.modalities}
    assert states([model.only("text")]) == {"image": [False], "text": [True], "audio": [False]}
    assert states([model.joint, *map(model.only, model.modalities)]) == {m: [True, False] for m in model.modalities}


def test_an_absent_branch_is_that_of_mean_rows_and_its_first_layer_is_computed_by_side_and_degree(build, train, random_features):
    model, text = build(2), torch.from_numpy(random_features(12, 2)["text"])
    adjacency, degree = torch.from_numpy(row_normalised_adjacency(train).toarray()), np.bincount(train.items, minlength=12)
    entered = []
    model.branch["text"].conv[0].register_forward_hook(lambda _module, entering, _output: entered.append(len(entering[0])))
    found = model.branches([model.only("image")])["text"][1][:, 0]
    assert entered == [len(set(train.degree)) + len(set(degree))] < [8 + 12]
    assert 0 in train.degree

    state = dict(model.named_parameters())
    state["preference.text"] = state["preference.text"].mean(0).expand(8, -1)
    expected = branch_by_hand(state, "text", text.mean(0).expand(12, -1), adjacency)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    names = [key for key, _ in model.named_parameters() if "text" in key or key in ("user_embedding", "item_embedding")]
    ours, theirs = (torch.autograd.grad(table.sin().sum(), [model.get_parameter(name) for name in names]) for table in (found, expected))
    for name, one, two in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13, msg=name)
