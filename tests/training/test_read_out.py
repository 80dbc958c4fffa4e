"""How a student is read out at the end: fitted, compared and chosen on validation."""

from ckd_fed.backbones.build import build_backbone
from ckd_fed.data.triples import TripleStream
from ckd_fed.evaluation.calibration import Calibration, combine
from ckd_fed.evaluation.ranking import evaluate
from ckd_fed.training import trainer as trainer_module
from ckd_fed.training.trainer import Trainer

B = 8
KS = (10, 20)


def test_calibration_never_chooses_what_validation_speaks_against(make_dataset, monkeypatch):
    """A fit that turns every ranking upside down is dropped for the view that is best on validation."""
    problem = make_dataset(n_users=40, n_items=200, n_modalities=3)
    backbone = build_backbone("vbpr", problem.train, problem.features, {"embedding_dim": 4}, seed=1)
    trainer = Trainer(backbone, problem, TripleStream(problem.train, problem.fingerprint, 3, B, 0), learning_rate=5e-3, ks=KS)
    joint = backbone.joint
    monkeypatch.setattr(trainer_module, "calibrate", lambda *_: Calibration({joint: -1.0}, -1.0))
    metrics, chosen = trainer.read_out(problem.test)
    recalls = {name.removeprefix("readout/val/"): value for name, value in chosen.items() if name.startswith("readout/val/")}
    calibrated = recalls.pop("calibrated")
    upside_down = combine(trainer.embeddings([joint]), {joint: -1.0})
    assert evaluate(upside_down, problem.train, problem.val, KS).compute()["recall@20"] < max(recalls.values()) == calibrated
    best = max(recalls, key=recalls.__getitem__)
    assert {name: value for name, value in chosen.items() if name.startswith("readout/weight/")} == {f"readout/weight/{best}": 1.0}
    view = "" if best == "joint" else f"only/{best.removeprefix('only ')}/"
    assert metrics.compute()["calibrated/ndcg@20"] == metrics.compute()[f"{view}ndcg@20"]


def test_the_read_out_is_chosen_on_validation_alone(make_dataset, monkeypatch):
    """Nothing that is fitted, compared or chosen has seen the test items, not even in their absence from training."""
    problem = make_dataset(n_users=40, n_items=200, n_modalities=3)
    fitted, fits, genuine = [], [], trainer_module.calibrate

    def spied(tables, train, held_out):
        fitted.append(held_out)
        fits.append(genuine(tables, train, held_out))
        return fits[-1]

    monkeypatch.setattr(trainer_module, "calibrate", spied)
    kept = 0
    for seed in range(8):
        backbone = build_backbone("vbpr", problem.train, problem.features, {"embedding_dim": 4}, seed=seed)
        trainer = Trainer(backbone, problem, TripleStream(problem.train, problem.fingerprint, 3, 8, 0), learning_rate=5e-3)
        _, chosen = trainer.read_out(problem.test)
        assert fitted.pop() is trainer.validation
        validated = {
            trainer_module.view_name(backbone, view): trainer.rank(problem.val, view).compute()["recall@20"]
            for view in (backbone.joint, *backbone.diagnosed.values())
        }
        assert {name: chosen[f"readout/val/{name}"] for name in validated} == validated
        tables, weights = trainer.embeddings(trainer_module.calibration_views(backbone)), fits.pop().weights
        calibrated = trainer_module.evaluate(trainer_module.combine(tables, weights), problem.train, problem.val, (10, 20)).compute()["recall@20"]
        assert chosen["readout/val/calibrated"] == max(calibrated, *validated.values())
        kept += calibrated > max(validated.values())
    assert kept, "no seed whose calibrated table is the best: choose others"
