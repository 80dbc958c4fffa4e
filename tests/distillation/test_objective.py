"""The objective of a step, recomputed by hand from embedding tables."""

import itertools

import numpy as np
import pytest
import torch

from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.distillation.distil import TeacherMargins
from ckd_fed.distillation.objective import DistillationObjective, PlainObjective

N_USERS, N_ITEMS = 9, 14
RHO, KAPPA, T, L2 = 0.3, 2.0, 0.5, 1e-2


@pytest.fixture(params=["mmgcn", "vbpr"])  # the objective knows nothing of a backbone but its margins and losses: two with BPR and L2 alone
def student(request, random_interactions, random_features):
    def make(n_modalities):
        train, features = random_interactions(N_USERS, N_ITEMS), random_features(N_ITEMS, n_modalities)
        return build_backbone(request.param, train, features, {"embedding_dim": 4, "l2": L2}, seed=3, dtype=torch.float64)

    return make


def random_triples(n, seed):
    rng = np.random.default_rng(seed)
    return Triples(*(torch.from_numpy(rng.integers(bound, size=n)) for bound in (N_USERS, N_ITEMS, N_ITEMS)))


RANKING, PAIRS = random_triples(20, 0), random_triples(30, 1)


def random_teachers(modalities, seed=2):
    rng = np.random.default_rng(seed)
    return {m: TeacherMargins(torch.from_numpy(rng.normal(size=20)), torch.from_numpy(rng.normal(size=30))) for m in modalities}


def by_hand(student, teachers, *, reweight=True, specific=True, generic=True):
    """The paper's formulas on full score matrices; effects and weights in numpy, hence without gradient."""
    modalities = student.modalities
    views = [frozenset(v) for n in range(1, len(modalities) + 1) for v in itertools.combinations(modalities, n)]
    tables = student.embed(views)

    def margin(view, triples):
        s = tables[frozenset(view)].users @ tables[frozenset(view)].items.T
        return s[triples.users, triples.first] - s[triples.users, triples.second]

    joint = margin(modalities, RANKING)
    effects = {}
    for m in modalities:
        numerator = (joint - margin(set(modalities) - {m}, RANKING)).detach().numpy()
        denominator = margin({m}, RANKING).detach().numpy()
        with np.errstate(all="ignore"):
            effects[m] = np.clip(np.where(denominator == 0, 0, numerator / denominator), 1e-8, 10)
    total = sum(effects[m] for m in teachers)
    n = len(teachers)
    kd = torch.zeros(len(RANKING), dtype=torch.float64)
    for m in teachers:
        w = torch.from_numpy(n / (n - 1) * (1 - effects[m] / total)) if reweight and n > 1 else 1.0
        if specific:
            kd = kd + w * torch.relu(teachers[m].ranking - margin({m}, RANKING))
        if generic:
            p, q = torch.sigmoid(teachers[m].distillation / T), torch.sigmoid(margin({m}, PAIRS) / T)
            kd = kd + w * KAPPA * (-p * torch.log(q + 1e-8) - (1 - p) * torch.log(1 - q + 1e-8)).mean()
    users, items = tables[frozenset(modalities)]
    rows = users[RANKING.users], items[RANKING.first], items[RANKING.second]
    l2 = L2 * sum(row.pow(2).sum() for row in rows) / 2 / len(RANKING)
    bpr = torch.nn.functional.softplus(-joint).mean()
    return bpr, l2, RHO * kd.mean(), kd, effects


def asked_of(teachers, seed=4):
    """The same teachers, each asked about two thirds of the triples."""
    rng = np.random.default_rng(seed)
    return {
        m: TeacherMargins(said.ranking, said.distillation, torch.from_numpy(rng.random(20) < 2 / 3), torch.from_numpy(rng.random(30) < 2 / 3))
        for m, said in teachers.items()
    }


@pytest.mark.parametrize("n_modalities", [2, 3])
@pytest.mark.parametrize("reweight", [True, False])
def test_a_teacher_that_was_not_asked_has_no_part(student, n_modalities, reweight):
    """Sample by sample, loss and weights are those of the modalities that were asked about it; generic means are over the pairs asked."""
    model = student(n_modalities)
    teachers = asked_of(random_teachers(model.modalities))
    full = DistillationObjective(rho=RHO, kappa=KAPPA, temperature=T)(model, RANKING, PAIRS, teachers)
    output = DistillationObjective(rho=RHO, kappa=KAPPA, temperature=T, reweight=reweight)(model, RANKING, PAIRS, teachers)
    student_pairs = model.step(RANKING, [], PAIRS, [model.only(m) for m in model.modalities]).distillation
    seen = set()
    for n in range(20):
        present = [m for m in model.modalities if teachers[m].asked_ranking[n]]
        seen.add(len(present))
        total = sum(full.modalities[m].effect[n] for m in present)
        expected = 0.0
        for m in model.modalities:
            weight = output.modalities[m].weight[n].item()
            if m not in present:
                assert weight == 0
                continue
            wanted = len(present) / (len(present) - 1) * (1 - full.modalities[m].effect[n] / total) if reweight and len(present) > 1 else 1.0
            assert weight == pytest.approx(float(wanted), abs=1e-12)
            kept = teachers[m].asked_distillation
            p, q = torch.sigmoid(teachers[m].distillation / T)[kept], torch.sigmoid(student_pairs[model.only(m)] / T)[kept]
            g = (-p * torch.log(q + 1e-8) - (1 - p) * torch.log(1 - q + 1e-8)).mean()
            expected = expected + weight * (torch.relu(teachers[m].ranking[n] - full.modalities[m].margin[n]) + KAPPA * g)
        assert output.per_sample[n].item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-10)
    assert seen == set(range(n_modalities + 1))
    m = model.modalities[0]
    counted = teachers[m].asked_ranking
    names, values, shares = output.distilled.means(counterfactual=True)
    means = {name: (value.item(), share.item()) for name, value, share in zip(names, values, shares, strict=True)}
    assert set(means) == {f"{name}/{m}" for name in ("generic", "specific", "effect", "weight") for m in model.modalities}
    for name in ("specific", "effect", "weight"):
        mean, share = means[f"{name}/{m}"]
        assert mean == pytest.approx(getattr(output.modalities[m], name)[counted].mean().item())
        assert share == pytest.approx(counted.double().mean().item())
    assert means[f"generic/{m}"][1] == pytest.approx(teachers[m].asked_distillation.double().mean().item())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, output.loss).values())


def test_teachers_asked_about_everything_or_nothing(student):
    model, objective = student(2), DistillationObjective(rho=RHO, kappa=KAPPA, temperature=T)
    teachers = random_teachers(model.modalities)
    whole = objective(model, RANKING, PAIRS, teachers)
    for all_of_them in (True, False):
        masks = torch.full((20,), all_of_them), torch.full((30,), all_of_them)
        said = {m: TeacherMargins(t.ranking, t.distillation, *masks) for m, t in teachers.items()}
        output = objective(model, RANKING, PAIRS, said)
        assert output.terms["kd"].item() == pytest.approx(whole.terms["kd"].item() if all_of_them else 0.0, rel=1e-12)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {key: parameter.grad.clone() for key, parameter in module.named_parameters()}


@pytest.mark.parametrize("n_modalities", [2, 3])
@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3)), ids=lambda s: "reweight={} specific={} generic={}".format(*s))
def test_loss_and_gradient_by_hand(student, n_modalities, switches):
    model = student(n_modalities)
    teachers = random_teachers(model.modalities)
    options = dict(zip(("reweight", "specific", "generic"), switches, strict=True))
    output = DistillationObjective(rho=RHO, kappa=KAPPA, temperature=T, **options)(model, RANKING, PAIRS, teachers)
    bpr, l2, kd, per_sample, effects = by_hand(model, teachers, **options)
    torch.testing.assert_close(output.terms["bpr"], bpr)
    torch.testing.assert_close(output.terms["l2"], l2)
    torch.testing.assert_close(output.terms["kd"], kd)
    torch.testing.assert_close(output.per_sample, per_sample)
    torch.testing.assert_close(output.loss, bpr + l2 + kd)
    for m, part in output.modalities.items():
        np.testing.assert_allclose(part.effect.numpy(), effects[m], rtol=1e-6)
    found, expected = gradients(model, output.loss), gradients(model, bpr + l2 + kd)
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-7, atol=1e-11)


def test_switches_leave_what_is_reported_alone(student):
    """Ablations change the sum, never the parts."""
    model = student(3)
    teachers = random_teachers(model.modalities)
    full = DistillationObjective()(model, RANKING, PAIRS, teachers)
    for off in ({"specific": False}, {"generic": False}, {"reweight": False}):
        output = DistillationObjective(**off)(model, RANKING, PAIRS, teachers)
        for m, part in output.modalities.items():
            for name in ("margin", "specific", "generic", "effect"):
                assert torch.equal(getattr(part, name), getattr(full.modalities[m], name))
            assert torch.equal(part.weight, torch.ones(20, dtype=torch.float64) if "reweight" in off else full.modalities[m].weight)
        assert torch.equal(output.terms["bpr"], full.terms["bpr"])
        assert torch.equal(output.joint_margin, full.joint_margin)
        assert output.terms["kd"] != full.terms["kd"]


def test_defaults_are_the_published_ones():
    objective = DistillationObjective()
    assert (objective.rho, objective.kappa, objective.temperature) == (0.01, 5.0, 0.1)
    assert (objective.reweight, objective.specific, objective.generic) == (True, True, True)


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_a_modality_without_a_teacher_is_left_out(student, n_modalities):
    model = student(n_modalities)
    teachers = random_teachers(model.modalities[1:])
    output = DistillationObjective(rho=RHO, kappa=KAPPA, temperature=T)(model, RANKING, PAIRS, teachers)
    assert set(output.modalities) == set(teachers)
    total = sum(part.weight for part in output.modalities.values())
    torch.testing.assert_close(total, torch.full_like(total, len(teachers)))
    bpr, l2, kd, per_sample, _ = by_hand(model, teachers)
    torch.testing.assert_close(output.per_sample, per_sample)
    torch.testing.assert_close(output.loss, bpr + l2 + kd)


def test_without_any_teacher_only_the_own_loss_remains(student):
    model = student(2)
    output = DistillationObjective()(model, RANKING, PAIRS, {})
    assert output.terms["kd"] == 0
    torch.testing.assert_close(output.loss, PlainObjective()(model, RANKING).loss)


def test_plain_objective(student):
    model = student(3)
    bpr, l2, *_ = by_hand(model, {})
    output = PlainObjective()(model, RANKING)
    torch.testing.assert_close(output.loss, bpr + l2)
    assert set(output.terms) == {"bpr", "l2"}
    assert not output.modalities
    assert output.per_sample is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_margins_poison_nothing(student, dtype):
    """A pair of the same item has margin 0 in every view: 0/0 in the published code."""
    model = student(3).to(dtype)
    ranking = Triples(RANKING.users, RANKING.first, RANKING.first)
    pairs = Triples(PAIRS.users, PAIRS.first, PAIRS.first)
    teachers = {
        m: TeacherMargins(margins.ranking.to(dtype), margins.distillation.to(dtype)) for m, margins in random_teachers(model.modalities).items()
    }
    output = DistillationObjective(rho=1.0)(model, ranking, pairs, teachers)
    for part in output.modalities.values():
        assert torch.equal(part.effect, torch.full((20,), 1e-8, dtype=dtype))
        torch.testing.assert_close(part.weight, torch.ones(20, dtype=dtype))
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, output.loss).values())


@pytest.mark.parametrize("n_modalities", [2, 3])
def test_views_without_a_modality_keep_no_gradient_unless_they_are_some_other_modalitys(student, n_modalities):
    model, constant = student(n_modalities), []
    step = model.step

    def is_constant(view):
        with model.gradient(view):
            return not torch.is_grad_enabled()

    def spied(*arguments):
        constant.append([view for view in map(model.without, model.modalities) if is_constant(view)])
        return step(*arguments)

    model.step = spied
    DistillationObjective()(model, RANKING, PAIRS, random_teachers(model.modalities)).loss.backward()
    assert constant == [[model.without(m) for m in model.modalities] if n_modalities > 2 else []]
    assert not is_constant(model.without("image"))
