"""The published balancing baselines do what their formulas say, and nothing when they are off."""

import math

import pytest
import torch

from ckd_fed.backbones.base import Triples
from ckd_fed.backbones.build import build_backbone
from ckd_fed.config import resolve
from ckd_fed.data.dataset import dense_features
from ckd_fed.errors import ConfigError
from ckd_fed.training.balancing import Balancing, GradientModulation, ModalityDropout, own_parameters
from ckd_fed.training.build import build_trainer
from ckd_fed.training.central import train


@pytest.fixture
def make_backbone(make_dataset):
    def make(name="vbpr", n_modalities=2, embedding_dim=4):
        dataset = make_dataset(n_modalities=n_modalities)
        features = {m: dense_features(dataset, m) for m in dataset.modalities}
        return build_backbone(name, dataset.train, features, {"embedding_dim": embedding_dim}, seed=1, dtype=torch.float64)

    return make


BATCH = Triples(torch.tensor([0, 1, 2, 3]), torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11, 12]))


def one_step(backbone, balancing):
    """A step of SGD with learning rate 1; returns parameter -> how far it moved, and its gradient."""
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0)
    balancing.start_epoch(torch.Generator().manual_seed(3))
    optimizer.zero_grad()
    balancing.loss(backbone, BATCH).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in backbone.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    balancing.step(backbone, optimizer)
    return {name: parameter.detach() - before[name] for name, parameter in backbone.named_parameters()}, gradients


@pytest.mark.parametrize("name", ["vbpr", "mmgcn"])
@pytest.mark.parametrize("n_modalities", [2, 3])
def test_the_modality_ahead_goes_its_kth_part_and_all_else_goes_all(name, n_modalities, make_backbone):
    backbone, balancing = make_backbone(name, n_modalities), GradientModulation(alpha=0.7, noise=False)
    with torch.no_grad():
        margins = backbone.step(BATCH, [backbone.only(m) for m in backbone.modalities]).ranking
    scores = {m: float(torch.sigmoid(margins[backbone.only(m)]).mean()) for m in backbone.modalities}
    moved, gradients = one_step(backbone, balancing)
    slowed = set()
    for m, score in scores.items():
        others = [other for k, other in scores.items() if k != m]
        ratio = score / (sum(others) / len(others))
        expected = 1 - math.tanh(0.7 * ratio) if ratio > 1 else 1.0
        assert balancing.coefficients[m] == pytest.approx(expected)
        slowed |= {m} if ratio > 1 else set()
    assert slowed
    for parameter, change in moved.items():
        owner = next((m for m in backbone.modalities if m in parameter.split(".")), None)
        factor = balancing.coefficients[owner] if owner else 1.0
        torch.testing.assert_close(change, -factor * gradients[parameter])


def test_what_lies_between_two_modalities_is_neithers_own(make_backbone):
    backbone = make_backbone("egogcn", 3)
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    own = {m: {names[id(parameter)] for parameter in parameters} for m, parameters in own_parameters(backbone).items()}
    assert any(name.startswith("gate.") for name in names.values())
    for m, found in own.items():
        assert found == {f"preference.{m}", f"projection.{m}.weight", f"projection.{m}.bias"}


def test_noise_has_the_gradients_deviation_and_spares_what_the_batch_did_not_touch(make_backbone):
    backbone = make_backbone()
    moved, gradients = one_step(backbone, GradientModulation(alpha=0.0, noise=True))
    for parameter, change in moved.items():
        noise = -change - gradients[parameter]
        assert not noise[gradients[parameter] == 0].any()  # exactly
        if "preference" in parameter:
            touched = gradients[parameter] != 0
            assert 0.3 < float(noise[touched].std() / gradients[parameter].std()) < 3
        if parameter in ("user_embedding", "item_embedding"):
            assert noise.abs().max() < 1e-12


def test_dropout_draws_every_view_as_often_as_it_should(make_backbone):
    backbone, balancing = make_backbone(), ModalityDropout(0.3)
    balancing.start_epoch(torch.Generator().manual_seed(0))
    views = [frozenset({"image"}), frozenset({"text"}), frozenset({"image", "text"})]
    drawn = balancing._draw(backbone, views, 100_000)
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    total = 0.3 * 0.7 * 2 + 0.7 * 0.7
    torch.testing.assert_close(shares, torch.tensor([0.21 / total, 0.21 / total, 0.49 / total]), atol=0.01, rtol=0)


def test_dropout_takes_bpr_on_the_drawn_view(make_backbone, monkeypatch):
    backbone, balancing = make_backbone(), ModalityDropout(0.5)
    monkeypatch.setattr(balancing, "_draw", lambda backbone, views, n: torch.tensor([0, 1, 2, 0]))
    output = balancing.loss(backbone, BATCH)
    margins = backbone.step(BATCH, [backbone.only("image"), backbone.only("text")]).ranking
    image, text, joint = (margins[view] for view in (backbone.only("image"), backbone.only("text"), backbone.joint))
    expected = torch.stack([image[0], text[1], joint[2], image[3]])
    torch.testing.assert_close(output.terms["bpr"], -torch.nn.functional.logsigmoid(expected).mean())
    torch.testing.assert_close(output.loss, sum(output.terms.values()))


def test_dropout_at_rate_zero_is_no_balancing(make_backbone):
    backbone, balancing = make_backbone(), ModalityDropout(0.0)
    balancing.start_epoch(torch.Generator().manual_seed(0))
    torch.testing.assert_close(balancing.loss(backbone, BATCH).loss, Balancing().loss(backbone, BATCH).loss)


def test_only_the_plain_student_is_balanced(make_dataset):
    dataset = make_dataset()
    config = resolve({"balancing.method": "modality-dropout", "model.embedding-dim": 4})
    assert isinstance(build_trainer(config, dataset, "plain").balancing, ModalityDropout)
    assert type(build_trainer(config, dataset, "student", distilled=True).balancing) is Balancing
    assert type(build_trainer(resolve({"model.embedding-dim": 4}), dataset, "plain").balancing) is Balancing


@pytest.mark.parametrize("method", ["gradient-modulation", "modality-dropout"])
def test_a_balanced_run_comes_out_the_same_twice_and_not_as_the_plain_one(method, tmp_path, write_dataset):
    folder = write_dataset("toy", n_users=60, n_items=40)
    small = {
        "dataset": "toy", "data.dir": str(folder), "home": str(tmp_path), "recipe": "no-distillation", "tracking.wandb": "off",
        "tracking.report": False,
        "training.epochs": 4, "training.validate-every": 2, "training.batch-size": 32, "training.learning-rate": 0.01, "model.embedding-dim": 4,
    }  # fmt: skip
    runs = [train(resolve(small, {"name": f"{name}{number}", "balancing.method": name})) for number, name in enumerate([method, method, "none"])]
    tests = [run.outcomes["student"].test for run in runs]
    assert tests[0] == tests[1]
    assert tests[0] != tests[2]


def test_what_cannot_be_balanced_is_said(make_backbone, refuses):
    backbone = make_backbone()
    backbone.named_parameters = lambda: iter([("projection.image.weight", torch.zeros(1))])
    refuses(ConfigError, lambda: own_parameters(backbone), "no parameters of modality 'text'")
    refuses(ConfigError, lambda: resolve({"balancing.rate": 1}), "balancing.rate is 1.0")
    refuses(ConfigError, lambda: resolve({"balancing.method": "ogm"}), "gradient-modulation, modality-dropout, none")


def test_a_single_number_gets_no_noise(make_backbone):
    """It has no deviation: a bias of an embedding of one dimension would become NaN."""
    backbone = make_backbone("vbpr", 2, embedding_dim=1)
    one_step(backbone, GradientModulation(alpha=0.0, noise=True))
    assert all(bool(parameter.isfinite().all()) for parameter in backbone.parameters())
