"""Trainer and Fit: the arithmetic of a step, stretches, the best snapshot, and that the thing learns."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.base import Backbone, Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.config import resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.triples import TripleStream
from ckd_fed.distillation.effects import LOWEST
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.distillation.objective import DistillationObjective, PlainObjective
from ckd_fed.errors import TrainingError
from ckd_fed.evaluation import per_user as per_user_module
from ckd_fed.evaluation import ranking as ranking_module
from ckd_fed.evaluation.metrics import RankingMetrics
from ckd_fed.evaluation.ranking import evaluate
from ckd_fed.training import fit as fit_module
from ckd_fed.training.build import build_trainer
from ckd_fed.training.fit import Fit
from ckd_fed.training.means import Means
from ckd_fed.training.trainer import Trainer

B, K = 8, 12
KS = (10, 20)


@pytest.fixture(params=["bm3", "freedom", "lattice", "mmgcn", "vbpr"])
def backbone_name(request):
    """Two plain backbones, and one each with dropout, a graph drawn every epoch and a graph learned every epoch."""
    return request.param


@pytest.fixture
def problem(make_dataset):
    return make_dataset(n_users=10, n_items=24, n_modalities=3)


@pytest.fixture
def make_trainer(problem, backbone_name):
    """A trainer of the dataset, distilled or plain."""

    def make(*, distilled=False, seed=0, modalities=("image", "text", "audio"), dtype=torch.float32, learning_rate=5e-3, share=(0, 1), **more):
        features = {m: problem.features[m] for m in modalities}
        backbone = build_backbone(backbone_name, problem.train, features, {"embedding_dim": 4, "l2": 1e-3}, seed=seed, dtype=dtype)
        stream = TripleStream(problem.train, problem.fingerprint, 3, B, K if distilled else 0)
        objective = DistillationObjective(rho=0.5, kappa=2.0, temperature=0.5) if distilled else None
        return Trainer(backbone, problem, stream, learning_rate=learning_rate, objective=objective, ks=KS, share=share, **more)

    return make


@pytest.fixture
def sheets(make_trainer):
    """Margins of fixed, untrained teachers."""
    tables = {m: make_trainer(seed=10 + n, modalities=(m,)).joint_tables() for n, m in enumerate(("image", "text", "audio"))}
    return lambda steps: {m: margin_sheet(table, steps, np.dtype("<f4")) for m, table in tables.items()}


def parameters(trainer):
    return {key: value.detach().clone() for key, value in trainer.backbone.named_parameters()}


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("distilled", [False, True])
def test_fit_equals_a_loop_by_hand(make_trainer, backbone_name, sheets, problem, distilled):
    """The step written out from the tables of all views, in float64, and torch's Adam in its plain form."""
    if backbone_name not in ("vbpr", "mmgcn"):
        pytest.skip("it is trained by more than BPR and L2; the suite of backbones holds its losses against its tables")
    trainer = make_trainer(distilled=distilled, dtype=torch.float64)
    model = copy.deepcopy(trainer.backbone)
    Fit(trainer, max_epochs=3, validate_every=2, patience=10).advance(sheets=sheets if distilled else None)

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, foreach=False, fused=False)
    modalities = model.modalities
    views = [frozenset(v) for n in range(1, 4) for v in itertools.combinations(modalities, n)]
    stream = TripleStream(problem.train, problem.fingerprint, 3, B, K if distilled else 0)
    for epoch in range(3):
        steps = [stream.step(epoch, step) for step in range(len(problem.train) // B + 1)]
        sheet = sheets(steps)
        for row, step in enumerate(steps):
            tables = model.embed(views)

            def margin(view, triples, tables=tables):
                u, i, j = torch.from_numpy(triples.astype(np.int64))
                users, items = tables[frozenset(view)]
                return (users[u] * items[i]).sum(1) - (users[u] * items[j]).sum(1)

            joint = margin(modalities, step.ranking)
            u, i, j = torch.from_numpy(step.ranking.astype(np.int64))
            users, items = tables[frozenset(modalities)]
            loss = torch.log1p(torch.exp(-joint)).mean() + 1e-3 / 2 / B * (
                users[u].square().sum() + items[i].square().sum() + items[j].square().sum()
            )
            if distilled:
                only = {m: margin([m], step.ranking) for m in modalities}
                with torch.no_grad():
                    effects = {m: ((joint - margin(set(modalities) - {m}, step.ranking)) / only[m]).clamp(1e-8, 10) for m in modalities}
                    total = sum(effects.values())
                per_sample = 0
                for m in modalities:
                    teacher = torch.from_numpy(sheet[m][row]).double()
                    h = (teacher[:B] - only[m]).clamp(min=0)
                    p, q = (teacher[B:] / 0.5).sigmoid(), (margin([m], step.distillation) / 0.5).sigmoid()
                    g = (-p * (q + 1e-8).log() - (1 - p) * (1 - q + 1e-8).log()).mean()
                    per_sample = per_sample + 1.5 * (1 - effects[m] / total) * (h + 2.0 * g)
                loss = loss + 0.5 * per_sample.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = dict(model.named_parameters())
    for key, value in parameters(trainer).items():
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("stretches", [(1, 1, 1, 1, 1), (3, 100)], ids=str)
def test_stretches_equal_one_uninterrupted_fit(make_trainer, sheets, distilled, stretches):
    options = {"max_epochs": 5, "validate_every": 2, "patience": 10}
    teach = sheets if distilled else None
    whole = Fit(make_trainer(distilled=distilled), **options)
    rows = whole.advance(sheets=teach)

    state, found = None, []
    for number, epochs in enumerate(stretches):
        part = Fit(make_trainer(distilled=distilled, seed=100 * number), **options)  # a fresh process: other initial parameters
        if state:
            part.trainer.restore(state["parameters"])
            part.trainer.optimizer.load_state(state["optimizer"])
            part.stopping, part.best, part.epoch = state["stopping"], state["best"], state["epoch"]
        found += part.advance(epochs, sheets=teach)
        state = copy.deepcopy(
            {
                "parameters": part.trainer.snapshot(),
                "optimizer": part.trainer.optimizer.state(),
                "stopping": part.stopping,
                "best": part.best,
                "epoch": part.epoch,
            }
        )
    assert part.done
    assert whole.done
    assert part.epoch == whole.epoch == 5
    assert_equal_bits(parameters(part.trainer), parameters(whole.trainer))
    assert_equal_bits(part.trainer.optimizer.state(), whole.trainer.optimizer.state())
    assert_equal_bits(part.best, whole.best)
    assert part.stopping == whole.stopping
    assert [row["epoch"] for row in found] == [row["epoch"] for row in rows] == [2, 4, 5]
    assert [row["val/recall@20"] for row in found] == [row["val/recall@20"] for row in rows]


def test_the_optimiser_state_matters(make_trainer):
    """Restoring the parameters alone is not enough, so the test above would notice a lost optimiser."""
    whole, part = make_trainer(), make_trainer()
    whole.train_epoch(0)
    part.restore(whole.snapshot())
    whole.train_epoch(1)
    part.train_epoch(1)
    assert any(not torch.equal(a, b) for a, b in zip(parameters(whole).values(), parameters(part).values(), strict=True))


def test_optimiser_state_is_complete_and_a_copy(make_trainer):
    trainer = make_trainer()
    assert trainer.optimizer.state() == {}
    trainer.optimizer.load_state({})
    trainer.train_epoch(0)
    state = trainer.optimizer.state()
    assert set(state) == {f"{name}/{key}" for name in parameters(trainer) for key in ("step", "exp_avg", "exp_avg_sq")}
    before = {key: value.clone() for key, value in state.items()}
    trainer.train_epoch(1)
    assert_equal_bits(state, before)
    assert trainer.optimizer.learning_rate == 5e-3


def test_a_snapshot_is_a_copy(make_trainer):
    trainer = make_trainer()
    snapshot = trainer.snapshot()
    before = parameters(trainer)
    trainer.train_epoch(0)
    assert_equal_bits(snapshot, before)
    trainer.restore(snapshot)
    assert_equal_bits(parameters(trainer), before)


@pytest.fixture
def scripted(monkeypatch):
    """Replace validation by a list of recalls."""

    def script(values):
        left = iter(values)
        monkeypatch.setattr(fit_module, "validate", lambda trainer: {"val/recall@20": next(left)})

    return script


def test_the_best_snapshot_is_that_of_the_best_epoch(make_trainer, scripted):
    scripted([0.1, 0.3, 0.2, 0.3])
    trainer, snapshots = make_trainer(), []
    fit = Fit(trainer, max_epochs=8, validate_every=2, patience=10)
    rows = fit.advance(on_validation=lambda row: snapshots.append(parameters(trainer)))
    assert [row["gain"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert (fit.stopping.best, fit.stopping.best_epoch) == (0.3, 4)
    assert_equal_bits(fit.best, snapshots[1])
    assert not torch.equal(fit.best["user_embedding"], snapshots[3]["user_embedding"])


def test_fit_stops_at_the_eleventh_validation_without_gain(make_trainer, scripted):
    scripted([0.5] + [0.5] * 30)
    fit = Fit(make_trainer(), max_epochs=1000, validate_every=1, patience=10)
    rows = fit.advance()
    assert len(rows) == 12
    assert fit.epoch == 12
    assert fit.done
    assert fit.advance() == []


def test_validation_comes_every_few_epochs_and_after_the_last(make_trainer):
    fit = Fit(make_trainer(), max_epochs=5, validate_every=3, patience=10)
    seen = []
    assert [row["epoch"] for row in fit.advance(2, on_validation=seen.append)] == []
    assert not fit.best
    assert not fit.done
    assert [row["epoch"] for row in fit.advance(1, on_validation=seen.append)] == [3]
    assert [row["epoch"] for row in fit.advance(on_validation=seen.append)] == [5]
    assert [row["epoch"] for row in seen] == [3, 5]
    assert fit.done


def test_rows_hold_the_training_means_and_all_metrics(make_trainer, sheets):
    trainer = make_trainer(distilled=True)
    twin = make_trainer(distilled=True)
    (row,) = Fit(trainer, max_epochs=2, validate_every=2, patience=10).advance(sheets=sheets)
    epochs = [twin.train_epoch(epoch, sheets(twin.stream.epoch(epoch))) for epoch in range(2)]
    for key in epochs[0]:
        assert row[key] == pytest.approx((epochs[0][key] + epochs[1][key]) / 2, rel=1e-12)
    modalities, own = trainer.backbone.modalities, set(twin.backbone.step(Triples(*torch.zeros(3, 1, dtype=torch.int64))).loss_terms)
    counterfactual = {f"{part}/{m}" for part in ("effect", "effect_share", "weight") for m in modalities}
    counterfactual |= {f"only/{m}/{name}@{k}" for m in modalities for name in ("recall", "ndcg") for k in KS}
    wanted = {f"{part}/{m}" for part in ("specific", "generic") for m in modalities}
    wanted |= {f"loss/{part}" for part in ("total", "kd", *own)} | {f"val/{name}@{k}" for name in ("recall", "ndcg") for k in KS}
    assert wanted <= set(row)
    assert row["loss/total"] == pytest.approx(row["loss/kd"] + sum(row[f"loss/{part}"] for part in own), rel=1e-5)
    assert row["val/recall@20"] == twin.rank(twin.dataset.val).compute()["recall@20"]
    if not trainer.backbone.scores_use_features:
        assert not counterfactual & set(row)
        return
    assert counterfactual <= set(row)
    assert sum(row[f"effect_share/{m}"] for m in modalities) == pytest.approx(1)
    assert sum(row[f"weight/{m}"] for m in modalities) == pytest.approx(3, rel=1e-5)
    only = twin.rank(twin.dataset.val, twin.backbone.only("text")).compute()
    assert row["only/text/recall@20"] == only["recall@20"]


def test_a_validation_on_some_users_ranks_for_these_and_the_test_for_all(make_trainer, problem):
    trainer = make_trainer(validation_users=4)
    assert len(trainer.validation.users) == 4 < len(problem.val.users)
    (row,) = Fit(trainer, max_epochs=1, validate_every=1, patience=1).advance()
    expected = evaluate(trainer.joint_tables(), problem.train, trainer.validation, KS).compute()
    assert {name: row[f"val/{name}"] for name in expected} == expected
    assert expected != evaluate(trainer.joint_tables(), problem.train, problem.val, KS).compute()
    assert trainer.test("student").metrics.n_users == len(problem.test.users)


def test_a_teacher_reports_no_only_metrics(make_trainer):
    teacher = make_trainer(modalities=("text",))
    assert not [key for key in teacher.diagnose(teacher.dataset.val).compute() if key.startswith("only/")]


def test_views_ranked_one_by_one_rank_as_together(make_trainer, monkeypatch):
    trainer, asked = make_trainer(), []
    genuine, n = trainer.embeddings, 1 + len(trainer.backbone.diagnosed)
    monkeypatch.setattr(trainer, "embeddings", lambda views: asked.append(len(views)) or genuine(views))
    found = []
    for cheap in (True, False):
        monkeypatch.setattr(trainer.backbone, "views_are_cheap", cheap)
        found.append(trainer.diagnose(trainer.dataset.val).compute())
    assert asked == [1] * n + [n]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_shares_of_a_diagnosis_merge_to_the_whole(make_trainer):
    trainer = make_trainer()
    whole, merged = trainer.diagnose(trainer.dataset.val), RankingMetrics(KS)
    for worker in range(3):
        part = trainer.diagnose(trainer.dataset.val, (worker, 3))
        merged.merge(part.sums, part.n_users)
    assert merged.n_users == whole.n_users == 10
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_shares_train_on_their_steps_alone(make_trainer):
    parts = [make_trainer(share=(worker, 3)) for worker in range(3)]
    twin = make_trainer()
    for worker, part in enumerate(parts):
        part.train_epoch(0)
        twin.restore(make_trainer().snapshot())
        twin.optimizer.load_state({})
        twin.train_epoch(0, steps=[twin.stream.step(0, s) for s in range(worker, twin.stream.steps_per_epoch, 3)])
        assert_equal_bits(parameters(part), parameters(twin))


def test_parameters_with_one_gradient_an_epoch_are_named(make_trainer):
    """The learning rate of several students must not grow for them: every student takes all of their steps."""
    trainer = make_trainer()
    backbone = trainer.backbone.train()
    backbone.start_epoch(0, torch.Generator().manual_seed(0))
    had = []
    for step in range(2):
        trainer.optimizer.zero_grad()
        PlainObjective()(backbone, Triples(*torch.from_numpy(trainer.stream.step(0, step).ranking).long())).loss.backward()
        had.append({name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.to_dense().any()})
    assert backbone.epoch_parameters == had[0] - had[1]


def test_learning_rates_grow_with_the_students_but_for_those(problem):
    config = resolve({"backbone": "lattice", "training.learning-rate": 0.01, "training.batch-size": 4, "model.embedding-dim": 4}, {})
    trainers = {w: build_trainer(config, problem, "student", share=(0, w)) for w in (1, 3)}
    before = parameters(trainers[1])
    assert_equal_bits(before, parameters(trainers[3]))
    for trainer in trainers.values():
        trainer.train_epoch(0, steps=[trainer.stream.step(0, 0)])
    moved = {w: {name: value - before[name] for name, value in parameters(trainer).items()} for w, trainer in trainers.items()}
    assert len(trainers[1].backbone.epoch_parameters) == 3 * 3 + 1
    for name, one in moved[1].items():
        factor = 1 if name in trainers[1].backbone.epoch_parameters else 3
        assert one.any(), name
        torch.testing.assert_close(moved[3][name], factor * one, rtol=1e-3, atol=1e-6)


def test_a_worker_without_a_step_trains_nothing(make_trainer):
    trainer = make_trainer(share=(999, 1000))
    before = parameters(trainer)
    assert trainer.train_epoch(0) == {}
    assert_equal_bits(parameters(trainer), before)


def test_a_distilled_worker_without_a_step_trains_nothing(make_trainer, sheets):
    trainer = make_trainer(distilled=True, share=(999, 1000))
    before = parameters(trainer)
    Fit(trainer, max_epochs=1, validate_every=1, patience=10).advance(sheets=sheets)
    assert_equal_bits(parameters(trainer), before)


def test_epoch_means_are_over_the_samples_that_a_teacher_was_asked_about(make_trainer, backbone_name, sheets, problem, monkeypatch):
    """A modality that few items have: most steps ask its teacher about nothing, and must not pull its means towards 0."""
    if backbone_name not in ("vbpr", "mmgcn"):
        pytest.skip("what is counted does not depend on the backbone")
    outputs, real = [], DistillationObjective.__call__
    monkeypatch.setattr(DistillationObjective, "__call__", lambda *given: outputs.append(real(*given)) or outputs[-1])
    trainer = make_trainer(distilled=True)
    few, none = np.arange(problem.n_items) % 3 == 0, np.arange(problem.n_items) == 3  # no pair of different items has the second
    trainer.dataset = dataclasses.replace(problem, masks={"text": few, "audio": none})
    trainer.stream = TripleStream(problem.train, problem.fingerprint, 3, 4, 6)
    steps = trainer.stream.epoch(0)
    values = trainer.train_epoch(0, sheets(steps), steps)
    asked = [output.modalities["text"].asked for output in outputs]
    assert any(mask.any() for mask in asked)
    assert not all(mask.any() for mask in asked)
    for name in ("effect", "weight", "specific"):
        counted = torch.cat([getattr(output.modalities["text"], name)[mask] for output, mask in zip(outputs, asked, strict=True)])
        assert values[f"{name}/text"] == pytest.approx(counted.double().mean().item(), rel=1e-6)
    assert (values["effect/audio"], values["weight/audio"], values["specific/audio"]) == (LOWEST, 0.0, 0.0)


def test_sheets_and_objective_go_together(make_trainer, sheets):
    with pytest.raises(ValueError, match="exactly if"):
        make_trainer().train_epoch(0, sheets(make_trainer(distilled=True).stream.epoch(0)))
    with pytest.raises(ValueError, match="exactly if"):
        make_trainer(distilled=True).train_epoch(0)


def test_a_loss_that_is_not_finite_stops_training(make_trainer, refuses):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.backbone.user_embedding[0, 0] = float("nan")
    refuses(TrainingError, lambda: [trainer.train_epoch(epoch) for epoch in range(4)], "loss/", "nan", "epoch ", "learning-rate")


def test_a_learning_rate_far_too_large_stops_training(make_trainer, refuses):
    fit = Fit(make_trainer(learning_rate=1e30), max_epochs=5, validate_every=1, patience=10)
    refuses(TrainingError, fit.advance, "learning-rate")


def test_a_nan_in_a_sheet_stops_training(make_trainer, sheets, refuses):
    trainer = make_trainer(distilled=True)
    margins = sheets(trainer.stream.epoch(0))
    margins["text"][0, 0] = np.nan
    refuses(TrainingError, lambda: trainer.train_epoch(0, margins), "loss/kd became nan", "epoch 1", "distillation.rho")


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("7.28 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"), ValueError("other")]
)
def test_too_little_memory_names_the_batch_sizes(error, make_trainer, sheets, monkeypatch):
    trainer = make_trainer(distilled=True)
    margins = sheets(trainer.stream.epoch(0))

    def fail(*_):
        raise error

    monkeypatch.setattr(DistillationObjective, "__call__", fail)
    with pytest.raises(ValueError if isinstance(error, ValueError) else TrainingError) as raised:
        trainer.train_epoch(0, margins)
    if not isinstance(error, ValueError):
        assert f"training.batch-size={B} or distillation.batch-size={K}" in str(raised.value)


def test_a_row_is_a_mean_over_samples_and_not_over_epochs(make_trainer, backbone_name, sheets, problem):
    """A modality that few items have is asked about in some epochs hardly at all: they count for as much as they hold."""
    if backbone_name != "vbpr":
        pytest.skip("what is counted does not depend on the backbone")
    few = np.arange(problem.n_items) == 3
    trainers = [make_trainer(distilled=True) for _ in range(2)]
    for trainer in trainers:
        trainer.dataset = dataclasses.replace(problem, masks={"text": few})
        trainer.stream = TripleStream(problem.train, problem.fingerprint, 3, 4, 400)
    (row,) = Fit(trainers[0], max_epochs=6, validate_every=6, patience=10).advance(sheets=sheets)
    each = []
    for epoch in range(6):
        means, steps = Means(), trainers[1].stream.epoch(epoch)
        values = trainers[1].train_epoch(epoch, sheets(steps), steps, means)
        each.append((values["generic/text"], means.asked()["asked/generic/text"]))
    values, asked = np.array(each).T
    assert len(set(asked)) > 1
    assert row["generic/text"] == pytest.approx(np.average(values, weights=asked), rel=1e-12)


@pytest.fixture
def toy(interactions, tmp_path):
    """Six groups of ten users and ten items; a user likes its group's items and nothing else, and every modality shows the group."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 10)
    splits = {"train": [], "val": [], "test": []}
    for user in range(60):
        liked = rng.permutation(np.flatnonzero(groups == groups[user]))
        for split, part in zip(splits, (liked[:6], liked[6:8], liked[8:]), strict=True):
            splits[split].append(part)
    features = {
        m: (np.eye(6)[groups] @ rng.normal(size=(6, d)) + 0.05 * rng.normal(size=(60, d))).astype(np.float32) for m, d in (("a", 8), ("b", 5))
    }
    parts = {split: interactions(rows, 60) for split, rows in splits.items()}
    return Dataset("toy", tmp_path, **parts, features=features, masks={})


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_learns_a_toy_with_an_obvious_answer(toy, name):
    """Teachers, then a student distilled from them: all find the group, the student by every view."""

    def fit(modalities, *, seed, sheets=None):
        features = {m: toy.features[m] for m in modalities}
        backbone = build_backbone(name, toy.train, features, {"embedding_dim": 8}, seed=seed)
        stream = TripleStream(toy.train, toy.fingerprint, 1, 60, 100 if sheets else 0)
        objective = DistillationObjective() if sheets else None
        trainer = Trainer(backbone, toy, stream, learning_rate=0.03, objective=objective, ks=KS)
        found = Fit(trainer, max_epochs=30, validate_every=5, patience=10)
        rows = found.advance(sheets=sheets)
        assert rows[-1]["loss/total"] < rows[0]["loss/total"]
        assert found.stopping.best > 0.95
        return trainer  # with its last parameters: Recall@20 of 60 items is perfect long before Recall@10

    teachers = {m: fit([m], seed=n) for n, m in enumerate(toy.features)}
    tables = {m: teacher.joint_tables() for m, teacher in teachers.items()}
    student = fit(list(toy.features), seed=9, sheets=lambda steps: {m: margin_sheet(t, steps, np.dtype("<f2")) for m, t in tables.items()})
    for trainer in (*teachers.values(), student):
        assert trainer.rank(toy.test).compute()["recall@10"] > 0.85  # chance: 0.19
    values = student.diagnose(toy.test).compute()
    if name != "bm3":  # its views are all the joint one
        assert values["only/a/recall@10"] > 0.4
        assert values["only/b/recall@10"] > 0.4


def test_features_in_bfloat16_learn_as_well(toy):
    """The toy once more with `training.feature-dtype`: nearly the same losses, and the same right answer."""
    losses, recalls = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = resolve({"training.feature-dtype": dtype, "training.learning-rate": 0.03, "training.batch-size": 60, "model.embedding-dim": 8})
        trainer = build_trainer(config, toy, "teacher/a")
        losses[dtype] = [trainer.train_epoch(epoch)["loss/total"] for epoch in range(20)]
        recalls[dtype] = trainer.rank(toy.test).compute()["recall@10"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert min(recalls.values()) > 0.85


@pytest.mark.parametrize("name", ["vbpr", "mmgcn"])  # views one after the other, and all at once
def test_a_test_ranks_every_view_once(name, make_dataset, monkeypatch):
    """Means, users and groups of the joint view are of one ranking, and the means are those of a diagnosis."""
    problem = make_dataset(n_users=40, n_items=200, n_modalities=3)
    trainer = build_trainer(resolve({"backbone": name, "model.embedding-dim": 4}), problem, "student")
    expected = trainer.diagnose(problem.test).compute()
    ranked = []
    top_items = ranking_module.top_items

    def counted(embeddings, *arguments):
        ranked.append(embeddings)
        return top_items(embeddings, *arguments)

    for module in (ranking_module, per_user_module):
        monkeypatch.setattr(module, "top_items", counted)
    tested = trainer.test("student")
    assert len(ranked) == 4
    assert tested.metrics.compute() == pytest.approx(expected, rel=1e-12)
    assert tested.by_user.values["recall@20"].mean() == pytest.approx(expected["recall@20"], abs=1e-6)


def test_every_trainer_of_a_process_works_with_its_own_threads(problem, monkeypatch):
    """A teacher of wide features and one of narrow ones, built one after the other and trained in turns."""
    found, real = [], Backbone.start_epoch
    monkeypatch.setattr(Backbone, "start_epoch", lambda *arguments: found.append(torch.get_num_threads()) or real(*arguments))
    config = {"training.batch-size": B, "model.embedding-dim": 4}
    before = torch.get_num_threads()
    try:
        trainers = [build_trainer(resolve({**config, "training.threads": n}), problem, f"teacher/{n}") for n in (2, 1)]
        for trainer in (*trainers, *trainers):
            trainer.train_epoch(0)
            trainer.joint_tables()
            found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == [2, 2, 1, 1] * 2
