"""Sweeps: every run once, taken up where they broke off, summed up in one table and one figure."""

import csv
import io
import shutil

import numpy as np
import pytest
from rich.console import Console

from ckd_fed.analysis.history import read_history
from ckd_fed.cli import main
from ckd_fed.config import configs_directory, resolve
from ckd_fed.errors import ConfigError, TrainingError
from ckd_fed.experiments import sweep
from ckd_fed.experiments.progress import SweepProgress
from ckd_fed.experiments.recipe import jobs, read_sweep
from ckd_fed.experiments.summary import spread, summarise
from ckd_fed.tracking.record import sole_writer
from ckd_fed.training import central, progress
from ckd_fed.training.trainer import Trainer

QUICK = {
    "data.standin": "never", "training.epochs": 2, "training.validate-every": 2, "training.batch-size": 64, "training.threads": 1,
    "model.embedding-dim": 4, "distillation.batch-size": 50, "tracking.wandb": "off", "tracking.report": False,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch, write_dataset):
    """A recipe of two variants over a dataset at home."""
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write_dataset("data/toy", n_users=60, n_items=40)
    path = tmp_path / "mine.yaml"
    path.write_text("title: Mine\nvariants:\n  full: {}\n  rho 1: {distillation: {rho: 1}}\n")
    return path


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that are trained, in order."""
    names, real = [], sweep.train

    def train(config, write, memory):
        names.append(config.name)
        return real(config, write, memory=memory)

    monkeypatch.setattr(sweep, "train", train)
    return names


def run(recipe, done=lambda job, how: None, **overrides):
    planned = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1, 2], {**QUICK, **overrides})
    return sweep.run_jobs(planned, done, lambda line: None)


@pytest.mark.parametrize("name", [path.stem for path in sorted((configs_directory() / "sweeps").glob("*.yaml"))])
def test_every_sweep_that_is_shipped_resolves(name):
    planned = jobs(read_sweep(name), ["baby", "tiktok"], ["vbpr", "mmgcn"], [1, 2], {})
    assert len({job.run for job in planned}) == len(planned) == 8 * len(read_sweep(name).variants)
    variants = [resolve(job.overrides) for job in planned if (job.dataset, job.backbone, job.seed) == ("baby", "vbpr", 1)]
    flat = [tuple(value for key, value in config.flat().items() if key not in ("name", "recipe")) for config in variants]
    assert len(set(flat)) == len(flat)  # no variant is another one again
    assert variants[0].distillation.enabled


def test_the_shipped_ablations_switch_what_they_say():
    variants = {job.variant: resolve(job.overrides) for job in jobs(read_sweep("ablations"), ["baby"], ["vbpr"], [1], {})}
    assert not variants["no specific loss"].distillation.specific
    assert not variants["no generic loss"].distillation.generic
    assert not variants["no reweighting"].distillation.reweight
    assert not variants["no distillation"].distillation.enabled
    for label in ("gradient modulation", "modality dropout"):
        assert variants[label].balancing.method == label.replace(" ", "-")
        assert not variants[label].distillation.enabled


def test_a_finished_run_is_kept_and_a_broken_one_begun_anew(recipe, trained, tmp_path):
    found = run(recipe)
    assert len(trained) == len(found) == 4
    assert {history.config["distillation.rho"] for job, history in found.items() if job.variant == "rho 1"} == {1.0}
    cut = tmp_path / "runs" / trained[2]
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:2]))
    ends = {}
    again = run(recipe, lambda job, how: ends.update({job.run: how}))
    assert trained[4:] == [cut.name]
    assert {name: how for name, how in ends.items() if how != "kept"} == {cut.name: "finished"}
    assert read_history(cut).state == "finished"
    assert again.keys() == found.keys()


def test_a_run_of_another_configuration_is_not_taken_for_this_one(recipe, trained, refuses):
    run(recipe)
    refuses(ConfigError, lambda: run(recipe, **{"distillation.kappa": 1}), "distillation.kappa 5.0 instead of 1.0", "another configuration")
    assert len(run(recipe, **{"training.threads": 2})) == 4  # what changes no result is no other configuration
    assert len(trained) == 4


def test_a_setting_younger_than_a_run_is_taken_to_have_had_its_default(recipe, trained, tmp_path, refuses):
    run(recipe)
    for name in trained:
        stored = tmp_path / "runs" / name / "config.yaml"
        text = stored.read_text()
        assert "  kappa: 5.0\n" in text
        stored.write_text(text.replace("  kappa: 5.0\n", ""))
    assert len(run(recipe)) == len(trained) == 4
    refuses(ConfigError, lambda: run(recipe, **{"distillation.kappa": 1}), "distillation.kappa 5.0 instead of 1.0", "another configuration")


def test_an_option_that_one_side_lacks_is_another_configuration(recipe, trained, tmp_path, refuses):
    run(recipe)
    refuses(ConfigError, lambda: run(recipe, **{"model.strange": 0.5}), "model.strange unset instead of 0.5", "another configuration")
    stored = tmp_path / "runs" / trained[0] / "config.yaml"
    stored.write_text(stored.read_text().replace("model:", "model:\n  strange: 1"))
    refuses(ConfigError, lambda: run(recipe), "model.strange 1 instead of unset", "another configuration")
    assert len(trained) == 4


@pytest.mark.parametrize("variant", ["{model: {strange: 1}}", "{model: {l2: -1}}"])
def test_an_impossible_option_is_told_before_anything_is_run(recipe, trained, tmp_path, refuses, variant):
    recipe.write_text(recipe.read_text() + f"  odd: {variant}\n")
    refuses(ConfigError, lambda: run(recipe), "strange" if "strange" in variant else "model.l2 is -1")
    assert not trained
    assert not (tmp_path / "runs").exists()


def test_a_run_of_other_data_is_not_taken_for_this_one(recipe, trained, tmp_path, write_dataset, refuses):
    run(recipe)
    toy = tmp_path / "data" / "toy"
    toy.rename(tmp_path / "moved")
    assert len(run(recipe, **{"data.dir": str(tmp_path / "moved")})) == 4  # the same data elsewhere
    write_dataset("data/toy", n_users=60, n_items=40)
    features = np.load(toy / "text_feat.npy")
    np.save(toy / "text_mask.npy", np.arange(40) > 0)
    refuses(ConfigError, lambda: run(recipe), "trained on another text mask (none)", toy, "remove it")
    (toy / "text_mask.npy").unlink()
    np.save(toy / "text_feat.npy", features + 1)
    refuses(ConfigError, lambda: run(recipe), "trained on other text features", toy)
    np.save(toy / "text_feat.npy", features)
    np.save(toy / "audio_feat.npy", features)
    refuses(ConfigError, lambda: run(recipe), "trained on other audio features (None)", toy)
    refuses(ConfigError, lambda: run(recipe, **{"data.dir": str(write_dataset("other", n_users=60, n_items=40, seed=1))}), "another split")
    assert len(trained) == 4


def test_a_kept_run_of_other_code_is_told(recipe, trained, monkeypatch):
    run(recipe)
    said = []
    monkeypatch.setattr(sweep, "code_version", lambda: "9.9.9+abc")
    planned = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1, 2], QUICK)
    assert len(sweep.run_jobs(planned, lambda job, how: None, said.append)) == len(said) == 4
    assert all("other code" in line and "9.9.9+abc" in line for line in said)
    assert len(trained) == 4


def test_a_run_that_another_process_is_training_is_left_to_it(recipe, trained, tmp_path):
    """Its folder has no last row and maybe no state yet, as one that broke off; but somebody holds its lock."""
    name = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1, 2], QUICK)[1].run
    directory, how = tmp_path / "runs" / name, {}
    with sole_writer(directory):
        (directory / "metrics.jsonl").write_text('{"event": "start"}\n')
        found = run(recipe, lambda job, ended: how.update({job.run: ended}))
        assert (directory / "metrics.jsonl").read_text() == '{"event": "start"}\n'
    assert name not in {job.run for job in found}
    assert len(found) == len(trained) == 3
    assert how[name].startswith("failed: ConfigError: another process is writing")
    assert len(run(recipe)) == 4
    assert trained.count(name) == 1


def test_a_run_that_another_process_finished_meanwhile_is_kept(recipe, trained, tmp_path):
    planned = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1], QUICK)
    how, inner = {}, []

    def done(job, ended):
        how[job.run] = ended
        if not inner:  # another sweep comes to this one's second run while it is at its first
            inner.append(True)
            run(recipe)

    sweep.run_jobs(planned, done, lambda line: None)
    assert how == {planned[0].run: "finished", planned[1].run: "kept"}
    assert trained.count(planned[1].run) == 1


def test_what_is_named_twice_is_run_once(recipe):
    once = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1, 2], {})
    assert jobs(read_sweep(str(recipe)), ["toy", "toy"], ["vbpr", "vbpr"], [1, 2, 1], {}) == once


@pytest.mark.parametrize("disturbed", ["", "code", "configuration", "metrics"])
def test_a_run_that_broke_off_goes_on_from_its_state(recipe, trained, tmp_path, monkeypatch, disturbed):
    whole = {job.run: history.final for job, history in run(recipe, **{"training.epochs": 6}).items()}
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    epochs, real = [], Trainer.train_epoch

    def train_epoch(self, *arguments, **more):
        epochs.append(arguments)
        if len(epochs) == 22:  # of the first run 18: two teachers and a student; of the second, which shares its teachers, the student's fourth
            raise KeyboardInterrupt
        return real(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, **{"training.epochs": 6})
    broken = tmp_path / "runs" / trained[-1]
    if disturbed == "code":
        monkeypatch.setattr(central, "code_version", lambda: "9.9.9+abc")
    elif disturbed == "configuration":
        (broken / "config.yaml").write_text((broken / "config.yaml").read_text().replace("epochs: 6", "epochs: 7"))
    elif disturbed == "metrics":
        (broken / "metrics.jsonl").write_bytes(b"")
    said = []
    planned = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1, 2], {**QUICK, "training.epochs": 6})
    found = sweep.run_jobs(planned, lambda job, how: None, said.append)
    how = "is begun anew" if disturbed else "goes on from its last state"
    assert f"{broken.name} had broken off; it {how}" in said
    assert all(history.state == "finished" for history in found.values())
    for job, history in found.items():
        numbers = {key: value for key, value in history.final.items() if key != "time" and "seconds" not in key}
        assert numbers == {key: value for key, value in whole[job.run].items() if key in numbers}


@pytest.mark.parametrize("content", [b"", b"\0\0\0\n", b'{"event": "start"', None])
def test_a_run_that_cannot_be_read_is_begun_anew(recipe, trained, tmp_path, content):
    run(recipe)
    path = tmp_path / "runs" / trained[1] / "metrics.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    assert len(run(recipe)) == 4
    assert trained[4:] == [trained[1]]
    assert read_history(path.parent).state == "finished"


def test_an_interruption_ends_the_sweep(recipe, monkeypatch):
    def train(config, write, memory):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)


@pytest.mark.parametrize("error", [TrainingError("loss became nan"), RuntimeError("out of memory\nsee above")])
def test_one_failure_does_not_keep_the_others_from_running(recipe, monkeypatch, capsys, error):
    real = sweep.train

    def train(config, write, memory):
        if config.name.endswith("s1-rho-1"):
            raise error
        return real(config, write, memory=memory)

    monkeypatch.setattr(sweep, "train", train)
    settings = " ".join(f"{key}={str(value).lower()}" for key, value in QUICK.items())
    with pytest.raises(SystemExit):
        main(["sweep", str(recipe), "--dataset", "toy", "--seeds", "1,2", "-c", settings])
    shown = capsys.readouterr()
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert f"1 of 4 runs failed: sweep-mine-toy-vbpr-s1-rho-1 (failed: {reason})" in shown.err
    assert "4/4 sweep-mine-toy-vbpr-s2-rho-1: finished" in shown.out


def test_table_and_figure(recipe, tmp_path, capsys):
    settings = " ".join(f"{key}={str(value).lower()}" for key, value in QUICK.items())
    main(["sweep", str(recipe), "--dataset", "toy", "--seeds", "1,2", "-c", settings, "--output", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    found = run(recipe)
    recalls = {}
    for job, history in found.items():
        recalls.setdefault(job.variant, []).append(history.tested("student")["recall@20"])
    for values in recalls.values():
        assert spread(values) in shown
        assert spread(values) in (tmp_path / "out" / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["variant"], row["seed"], float(row["recall@20"])) for row in rows] == [
        (variant, str(seed), recalls[variant][seed - 1]) for variant in recalls for seed in (1, 2)
    ]
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    first, second = summarise(read_sweep(str(recipe)), found)
    assert first.gain is None
    assert second.gain == pytest.approx(np.mean([b / a - 1 for a, b in zip(recalls["full"], recalls["rho 1"], strict=True)]))


def test_spread_by_hand():
    assert spread([0.1]) == "0.1000"
    assert spread([0.1, 0.3]) == "0.2000 ± 0.1414"


def test_a_plain_recipe_is_a_sweep_of_two():
    recipe = read_sweep("no-reweighting")
    assert list(recipe.variants.values()) == [{}, {"recipe": "no-reweighting"}]


def test_a_number_with_an_exponent_is_a_number_in_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("variants:\n  a: {training.learning-rate: 1e-3, model.l2: 2E-5, distillation.rho: 1.5e1, tracking.group: 1e-3x}\n")
    variant = read_sweep(str(path)).variants["a"]
    assert variant == {"training.learning-rate": 1e-3, "model.l2": 2e-5, "distillation.rho": 15.0, "tracking.group": "1e-3x"}
    config = resolve(variant)
    assert (config.training.learning_rate, config.model["l2"], config.distillation.rho) == (1e-3, 2e-5, 15.0)


def test_a_backbone_of_ones_own_gives_run_names_that_compare_can_read():
    (job,) = jobs(read_sweep("no-reweighting"), ["toy"], ["mine.module:Own"], [1], {})[:1]
    assert job.run == "sweep-no-reweighting-toy-mine.module-Own-s1-as-configured"
    assert job.overrides["backbone"] == "mine.module:Own"


def test_what_is_no_sweep_is_said(tmp_path, refuses, capsys):
    refuses(ConfigError, lambda: read_sweep("ablation"), "unknown sweep recipe 'ablation'", "did you mean 'ablations'")
    path = tmp_path / "bad.yaml"
    faults = {"a: [": "not valid YAML", "title: x": "variants:", "variants: {a: 1}": "variants:", "variants: {a b: {}, a-b: {}}": "a-b, a-b"}
    faults["variants: {a: {}, b: {backbone: mmgcn, seed: 5}}"] = "variant 'b' sets backbone, seed"
    faults["variants: {a: {resume: other}}"] = "variant 'a' sets resume"
    for text, mention in faults.items():
        path.write_text(text)
        refuses(ConfigError, lambda: read_sweep(str(path)), path, mention)
    for arguments, mention in ((["--seeds", "x"], "--seeds is 'x'"), (["-c", "seed=3"], "-c sets seed"), (["-c", "resume=r"], "-c sets resume")):
        with pytest.raises(SystemExit):
            main(["sweep", "ablations", *arguments])
        assert mention in capsys.readouterr().err


def test_a_dry_run_refuses_what_a_run_would(recipe, capsys):
    before = sorted(recipe.parent.rglob("*"))
    main(["sweep", str(recipe), "--dataset", "toy", "--dataset", "baby", "--seeds", "1,2", "--dry-run"])
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert sorted(recipe.parent.rglob("*")) == before
    for arguments, mention in (
        (["--seeds", "1,-1"], "seed is -1"),
        (["--dataset", "nope"], "unknown dataset 'nope'"),
        (["-c", "nope=1"], "'nope'"),
        (["-c", "model.nope=1"], "'nope'"),
    ):
        with pytest.raises(SystemExit):
            main(["sweep", str(recipe), "--dataset", "toy", "--dry-run", *arguments])
        caught = capsys.readouterr()
        assert mention in caught.err
        assert caught.out == ""


def test_one_reason_is_said_once(recipe, monkeypatch, capsys):
    def fail(config, write, memory):
        raise TrainingError("it is broken")

    monkeypatch.setattr(sweep, "train", fail)
    with pytest.raises(SystemExit):
        main(["sweep", str(recipe), "--dataset", "toy", "--seeds", "1,2", "-c", "data.standin=never"])
    said = capsys.readouterr().err
    assert said.startswith("ckd-fed: 4 of 4 runs failed: sweep-mine-toy-vbpr-s1-full, ")
    assert said.count("it is broken") == 1


def lines_of_a_run(recipe):
    planned = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1], QUICK)
    return planned, [
        "toy: 60 users",
        "round   1 teachers   image: epoch 2 loss 0.69",
        "NOTE: [brackets]",
        "round   2 distilling epoch 2 loss 3.1 (bpr 0.7)",
    ]


def test_a_log_says_now_and_then_how_a_run_goes(recipe, capsys):
    planned, lines = lines_of_a_run(recipe)
    for every, expected in ((0.0, [f"{planned[0].run}: {line}" for line in lines if line.startswith("round")]), (3600.0, [])):
        with SweepProgress(Console(file=io.StringIO()), len(planned), every) as progress:
            for line in lines:
                progress.at(planned[0], line)
            progress.done(planned[0], "finished")
        assert capsys.readouterr().out.splitlines() == [*expected, f"1/2 {planned[0].run}: finished"]


def test_a_terminal_shows_where_the_running_run_stands(recipe):
    planned, lines = lines_of_a_run(recipe)
    out = io.StringIO()
    with SweepProgress(Console(file=out, force_terminal=True, width=160), len(planned)) as progress:
        for line in lines:
            progress.at(planned[0], line)
        progress._bar.refresh()
        progress.done(planned[0], "failed: ValueError: [1] is not a number")
    shown = out.getvalue()
    assert "full: round   2 distilling epoch 2" in shown
    assert "3.1" not in shown
    assert "brackets" not in shown
    assert f"{planned[0].run}: failed: ValueError: [1] is not a number" in shown
    assert "1/2" in shown


def test_the_lines_of_a_run_reach_the_sweep(recipe):
    planned, said = jobs(read_sweep(str(recipe)), ["toy"], ["vbpr"], [1], QUICK)[:1], []
    sweep.run_jobs(planned, lambda job, how: None, lambda line: None, lambda job, line: said.append((job.run, line)))
    assert {name for name, _ in said} == {planned[0].run}
    assert any(line.startswith("round ") for _, line in said)
