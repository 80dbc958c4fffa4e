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


def test_absent_inputs_are_one_row_for_all(build):
    """Users differ in an absent branch through their IDs and neighbours only: equal rows enter it."""
    model = build(2)
    entering = model._input("text", False).detach().numpy()
    assert np.ptp(entering[: model.n_users], axis=0).max() == 0
    assert np.ptp(entering[model.n_users :], axis=0).max() == 0
