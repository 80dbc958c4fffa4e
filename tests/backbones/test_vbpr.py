"""What only VBPR promises: margins are sums over blocks."""

import pytest
import torch

from ckd_fed.backbones import projection
from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone


@pytest.fixture
def parts(random_interactions, random_features):
    train, features = random_interactions(8, 12), random_features(12, 3)
    options = {"embedding_dim": 4}
    student = build_backbone("vbpr", train, features, options, seed=0, dtype=torch.float64)
    teachers = {m: build_backbone("vbpr", train, {m: x}, options, seed=1, dtype=torch.float64) for m, x in features.items()}
    for teacher in teachers.values():
        teacher.load_state_dict({key: value for key, value in student.state_dict().items() if key in teacher.state_dict()})
    triples = Triples(torch.tensor([0, 3, 7, 7]), torch.tensor([1, 2, 11, 0]), torch.tensor([5, 6, 0, 3]))
    return student, teachers, triples


def test_blocks_add_up(parts):
    student, _, triples = parts
    empty = frozenset()
    output = student.step(triples, [empty, *map(student.only, student.modalities)]).ranking
    parts_sum = sum(output[student.only(m)] - output[empty] for m in student.modalities)
    torch.testing.assert_close(output[student.joint], output[empty] + parts_sum)


def test_a_teacher_needs_no_other_modality(parts):
    """The teacher built from one modality alone has the margins of the full model's ``only m`` view."""
    student, teachers, triples = parts
    for m, teacher in teachers.items():
        torch.testing.assert_close(teacher.step(triples).ranking[teacher.joint], student.step(triples, [student.only(m)]).ranking[student.only(m)])


def test_embeddings_by_hand(parts):
    student, _, _ = parts
    state, view = student.state_dict(), frozenset(["text"])
    users, items = student.embed([view])[view]
    f = {m: student.features(m) for m in student.modalities}
    for n, m in enumerate(student.modalities, 1):
        block = slice(4 * n, 4 * n + 4)
        x = f[m] if m == "text" else f[m].mean(0).expand_as(f[m])
        q = state[f"preference.{m}"]
        torch.testing.assert_close(items[:, block], x @ state[f"projection.{m}.weight"].T + state[f"projection.{m}.bias"])
        torch.testing.assert_close(users[:, block], q if m == "text" else q.mean(0).expand_as(q))
    torch.testing.assert_close(users[:, :4], state["user_embedding"])
    torch.testing.assert_close(items[:, :4], state["item_embedding"])


@pytest.mark.parametrize(
    "pairs", [None, Triples(torch.tensor([2, 2, 6]), torch.tensor([9, 1, 1]), torch.tensor([9, 4, 0]))], ids=["plain", "distilled"]
)
def test_wide_features_give_the_same_step(parts, monkeypatch, pairs):
    """Projected as distinct rows in blocks (here of two rows), margins, losses and gradients are those of the whole catalogue."""
    student, _, triples = parts
    views = [student.only(m) for m in student.modalities]

    def step():
        output = student.step(triples, views, pairs, views if pairs else [])
        values = [*output.loss_terms.values(), *output.ranking.values(), *output.distillation.values()]
        weights = torch.linspace(0.5, 1.5, sum(v.numel() for v in values), dtype=torch.float64)
        total = (torch.cat([v.flatten() for v in values]) * weights).sum()
        return [v.detach() for v in values], torch.autograd.grad(total, list(student.parameters()))

    expected = step()
    calls = []
    monkeypatch.setattr(projection, "BLOCK", 2 * min(student.features(m).shape[1] for m in student.modalities))
    monkeypatch.setattr(projection, "_blocks", lambda *given, real=projection._blocks: calls.append(len(given[1])) or real(*given))
    torch.testing.assert_close(step(), expected, rtol=1e-12, atol=1e-12)
    distinct = {*triples.first.tolist(), *triples.second.tolist(), *((*pairs.first.tolist(), *pairs.second.tolist()) if pairs else ())}
    assert calls == [len(distinct)] * (2 * len(student.modalities))  # forward and backward
