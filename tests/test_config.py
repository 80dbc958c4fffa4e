"""The validated configuration: layers, refusals, and that what is written comes back."""

import dataclasses
from typing import get_type_hints

import pytest
import yaml
from flwr.common.config import parse_config_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckd_fed import config as module
from ckd_fed.backbones import BACKBONES
from ckd_fed.cli import parse_overrides, toml_overrides
from ckd_fed.commands.keys import described_sections, in_words
from ckd_fed.config import Config, configs_directory, flatten, read_recipe, resolve, restore
from ckd_fed.errors import ConfigError

REAL = configs_directory()


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """An empty ``configs/`` and a function to put files there."""
    monkeypatch.setattr(module, "configs_directory", lambda: tmp_path)

    def write(kind, name, **values):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(values.pop("raw", None) or yaml.safe_dump(values))

    return write


def test_defaults_are_the_published_protocol():
    config = resolve()
    assert config == Config()
    assert (config.training.learning_rate, config.training.batch_size, config.training.validate_every, config.training.patience) == (
        5e-4,
        1024,
        5,
        10,
    )
    assert (config.distillation.rho, config.distillation.kappa, config.distillation.temperature, config.distillation.batch_size) == (
        0.01,
        5,
        0.1,
        5000,
    )
    assert config.ks == (10, 20)


def test_layers_and_their_precedence(configs):
    def layers(value):
        return {"training": {"epochs": value}}

    found = [resolve().training.epochs]
    configs("datasets", "baby", **layers(1))
    found.append(resolve().training.epochs)
    configs("backbones", "vbpr", **layers(2))
    found.append(resolve().training.epochs)
    configs("recipes", "quick", **layers(3))
    found.append(resolve({"recipe": "quick"}).training.epochs)
    found.append(resolve({"recipe": "quick", "training.epochs": 4}).training.epochs)
    found.append(resolve({"recipe": "quick", "training.epochs": 4}, {"training.epochs": 5}).training.epochs)
    assert found == [1000, 1, 2, 3, 4, 5]
    assert resolve({"recipe": "quick", "dataset": "other"}).dataset == "other"
    assert resolve({"backbone": "mmgcn"}).training.epochs == 1, "only the chosen backbone's file is read"


def test_a_recipe_may_choose_dataset_and_backbone(configs):
    configs("recipes", "small", dataset="tiny", backbone="mmgcn")
    configs("datasets", "tiny", training={"epochs": 7})
    configs("backbones", "mmgcn", model={"embedding-dim": 8})
    config = resolve({"recipe": "small"})
    assert (config.dataset, config.backbone, config.training.epochs, config.model) == ("tiny", "mmgcn", 7, {"embedding_dim": 8})
    assert resolve({"recipe": "small", "backbone": "vbpr"}).backbone == "vbpr"


def test_hyphens_underscores_dots_and_nesting_are_the_same():
    expected = resolve({"training.learning-rate": 0.1, "model.embedding-dim": 3})
    assert resolve({"training.learning_rate": 0.1, "model.embedding_dim": 3}) == expected
    assert resolve({"training": {"learning-rate": 0.1}, "model": {"embedding_dim": 3}}) == expected
    assert (
        resolve({"training.learning_rate": 0.2, "model.embedding-dim": 4}, {"training": {"learning-rate": 0.1}, "model.embedding_dim": 3}) == expected
    )
    assert flatten({"a-b": {"c-d": 1, "e": {}}}) == {"a_b.c_d": 1}


def test_an_empty_string_means_not_set():
    assert resolve({"dataset": "", "training.device": "", "training.epochs": "", "tracking.group": "", "recipe": ""}) == Config()
    assert resolve({"dataset": "tiktok"}, {"dataset": ""}).dataset == "tiktok"


def test_an_empty_string_in_a_file_means_not_set_too(configs):
    configs("datasets", "baby", tracking={"project": "mine"})
    configs("recipes", "quick", tracking={"project": ""})
    assert resolve({"recipe": "quick"}).tracking.project == "mine"


def test_an_empty_file_sets_nothing(configs):
    configs("datasets", "baby", raw="# nothing yet\n")
    assert resolve() == Config()


@pytest.mark.parametrize(
    ("key", "mentions"),
    [
        ("trianing.epochs", ["'trianing.epochs'", "did you mean 'training.epochs'", "distillation.rho"]),
        ("training.learning-rates", ["did you mean 'training.learning-rate'"]),
        ("epochs", ["'epochs'", "training.epochs"]),
        ("training", ["'training'"]),
        ("training.epochs.more", ["'training.epochs.more'"]),
        ("model", ["'model'", "model.<option>"]),
        ("model.a.b", ["'model.a.b'"]),
        ("dataset.name", ["'dataset.name'"]),
        ("ks", ["'ks'"]),
        ("", ["''"]),
        (".", ["'.'"]),
    ],
)
def test_unknown_keys(refuses, key, mentions):
    refuses(ConfigError, lambda: resolve({key: 1}), "configuration key", *mentions)


@pytest.mark.parametrize(
    ("key", "value", "mentions"),
    [
        ("backbone", "vpbr", ["'vpbr'", "did you mean 'vbpr'", *BACKBONES]),
        ("backbone", 3, ["3", *BACKBONES]),
        ("recipe", "none-such", ["'none-such'", "choices"]),
        ("dataset", "a/b", ["'a/b'"]),
        ("dataset", "..", ["'..'"]),
        ("dataset", 5, ["5", "string"]),
        ("name", "a/b", ["'a/b'"]),
        ("name", "../x", ["'../x'"]),
        ("seed", -1, ["-1", "at least 0"]),
        ("seed", 1.0, ["1.0", "whole number"]),
        ("seed", True, ["True", "whole number"]),
        ("seed", "12", ["'12'", "whole number"]),
        ("seed", 2**64, [str(2**64)]),
        ("plain", 1, ["1", "true or false"]),
        ("plain", "true", ["'true'", "true or false"]),
        ("training.batch-size", 1 << 25, ["33554432", "at most"]),
        ("distillation.batch-size", 1 << 62, ["at most"]),
        ("training.threads", 10**9, ["at most 1024"]),
        ("training.device", "cuda:99999999999999999999", ["cuda:N"]),
        ("recipe", "../datasets/baby", ["unknown recipe '../datasets/baby'"]),
        ("name", "a:b", ["colon", "RUN:MODEL"]),
        ("name", 7, ["a string is needed", "name='\"7\"'"]),
        ("data.standin", "yes", ["'yes'", "always", "auto", "never"]),
        ("data.modalities", "image, image", ["image, image", "twice"]),
        ("training.learning-rate", 0, ["0", "greater than 0"]),
        ("training.learning-rate", -0.1, ["-0.1", "greater than 0"]),
        ("training.learning-rate", float("nan"), ["nan", "finite"]),
        ("training.learning-rate", float("inf"), ["inf", "finite"]),
        ("training.learning-rate", "fast", ["'fast'", "finite number"]),
        ("training.learning-rate", None, ["None"]),
        ("training.learning-rate", [1], ["[1]"]),
        pytest.param("training.learning-rate", 10**400, ["finite"], id="learning-rate-of-400-digits"),
        ("training.batch-size", 0, ["0", "at least 1"]),
        ("training.epochs", 0, ["at least 1"]),
        ("training.validate-every", 0, ["at least 1"]),
        ("training.patience", -1, ["-1", "at least 0"]),
        ("training.device", "gpu", ["'gpu'", "cpu", "cuda:N"]),
        ("training.device", "cuda:", ["'cuda:'", "cuda:N"]),
        ("training.device", "cpu:0", ["'cpu:0'"]),
        pytest.param("training.device", "cuda:²", ["²", "cuda:N"], id="cuda-superscript"),
        ("training.feature-dtype", "float16", ["'float16'", "float32", "bfloat16"]),
        ("distillation.rho", -1, ["-1", "at least 0"]),
        ("distillation.temperature", 0, ["greater than 0"]),
        ("distillation.batch-size", 0, ["at least 1"]),
        ("distillation.margin-dtype", "float8", ["'float8'", "float16", "float32"]),
        ("evaluation.ks", "10", ["'10'", "20 must be among"]),
        ("evaluation.ks", "10,x,20", ["'10,x,20'", "positive whole numbers"]),
        ("evaluation.ks", "0,20", ["'0,20'"]),
        ("evaluation.ks", "-5,20", ["'-5,20'"]),
        ("evaluation.ks", "10,20,", ["'10,20,'"]),
        ("evaluation.ks", 20, ["20", "string"]),
        ("federation.student-workers", 0, ["at least 1"]),
        ("federation.reply-timeout", 0, ["greater than 0"]),
        ("tracking.wandb", "on", ["'on'", "online", "offline", "off"]),
        ("model.embedding-dim", [1], ["[1]"]),
        ("model.embedding_dim", None, ["None"]),
    ],
)
def test_impossible_values_name_key_and_value(refuses, key, value, mentions):
    refuses(ConfigError, lambda: resolve({key: value}), key.replace("_", "-"), *mentions)


def test_distillation_without_a_loss_is_refused(refuses):
    off = {"distillation.specific": False, "distillation.generic": False}
    refuses(ConfigError, lambda: resolve(off), "distillation.specific", "distillation.generic")
    assert not resolve({**off, "distillation.enabled": False}).distillation.enabled


def test_choices_of_recipes_are_listed(configs, refuses):
    configs("recipes", "quick", seed=1)
    refuses(ConfigError, lambda: read_recipe("quik"), "'quik'", "did you mean 'quick'")


@pytest.mark.parametrize("raw", ["a: [1", "- 1\n- 2", "just text", "a: 1\n\tb: 2", "\x00"])
def test_damaged_files(configs, tmp_path, refuses, raw):
    configs("recipes", "bad", raw=raw)
    refuses(ConfigError, lambda: resolve({"recipe": "bad"}), tmp_path / "recipes" / "bad.yaml")


def test_a_file_that_is_no_text(configs, tmp_path, refuses):
    configs("recipes", "bad", seed=1)
    (tmp_path / "recipes" / "bad.yaml").write_bytes(b"seed: \xff\xfe")
    refuses(ConfigError, lambda: resolve({"recipe": "bad"}), tmp_path / "recipes" / "bad.yaml")


def test_files_are_checked_like_everything_else(configs, refuses):
    configs("datasets", "baby", training={"epoch": 3})
    refuses(ConfigError, resolve, "'training.epoch'")
    configs("datasets", "baby", training={"epochs": "many"})
    refuses(ConfigError, resolve, "training.epochs", "'many'")


def test_a_recipe_with_an_unknown_backbone_is_refused(configs, refuses):
    configs("recipes", "odd", backbone="vpbr")
    refuses(ConfigError, lambda: resolve({"recipe": "odd"}), "'vpbr'", *BACKBONES)


def test_modalities_and_cut_offs_are_parsed():
    config = resolve({"data.modalities": "text, image ,", "evaluation.ks": "50, 20,5,20"})
    assert config.modalities == ("text", "image")
    assert config.ks == (5, 20, 50)
    assert resolve().modalities == ()


def test_whole_numbers_are_fine_where_a_fraction_is_allowed():
    value = resolve({"distillation.kappa": 3}).distillation.kappa
    assert value == 3.0
    assert isinstance(value, float)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().seed = 3


def test_flat_has_every_key_hyphenated():
    flat = resolve({"model.embedding-dim": 8}).flat()
    assert flat["training.learning-rate"] == 5e-4
    assert flat["model.embedding-dim"] == 8
    assert all("_" not in key for key in flat)
    assert {"seed", "data.dir", "distillation.margin-dtype", "evaluation.ks", "federation.enrol-timeout", "tracking.tags"} <= set(flat)


def test_a_run_written_with_underscores_comes_back():
    """Older runs have a backbone's options so in their ``config.yaml``."""
    stored = resolve({"model.embedding-dim": 8, "model.l2": 0.5}).to_yaml().replace("embedding-dim:", "embedding_dim:")
    assert "  embedding_dim: 8\n" in stored
    assert restore(yaml.safe_load(stored)).model == {"embedding_dim": 8, "l2": 0.5}


def test_every_key_is_described():
    described = [key for keys in described_sections().values() for key in keys]
    assert {key.name: key.default for key in described} == Config().flat()
    for key in described:
        assert key.help.endswith("."), key.name
        assert key.allowed, key.name


@pytest.mark.parametrize(
    ("kind", "rules", "words"),
    [
        (bool, {}, "true or false"),
        (int, {"low": 1}, "whole number, at least 1"),
        (float, {"above": 0}, "number, above 0"),
        (float, {"low": 0, "below": 1}, "number, at least 0, below 1"),
        (str, {}, "text"),
        (str, {"choices": ("a", "b", "c")}, "a, b or c"),
        (str, {"allowed": "absolute path"}, "absolute path"),
    ],
)
def test_allowed_values_in_words(kind, rules, words):
    assert in_words(kind, rules) == words


TEXT = st.text("abc xyz-_:#'\"é,1.", min_size=1, max_size=8)
RUN_NAME = TEXT.filter(lambda name: not name.startswith("."))
SPECIAL = {
    "dataset": st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,8}", fullmatch=True),
    "backbone": st.sampled_from(sorted(BACKBONES)),
    "recipe": st.just(""),
    "name": RUN_NAME.filter(lambda name: ":" not in name),
    "resume": RUN_NAME,
    "data.modalities": st.lists(st.sampled_from(["image", "text", "audio"]), unique=True).map(",".join),
    "training.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    "data.missing": st.dictionaries(st.sampled_from(["image", "text"]), st.floats(0, 1)).map(lambda d: ",".join(f"{m}:{s}" for m, s in d.items())),
    "evaluation.ks": st.sets(st.integers(1, 100)).map(lambda ks: ",".join(map(str, {20, *ks}))),
    "seed": st.integers(0, 2**63 - 1),
}


def values_of(owner, prefix=""):
    """Key -> strategy for values that are allowed, read off the schema."""
    found = {}
    hints = get_type_hints(owner)
    for item in dataclasses.fields(owner):
        key, kind, rules = (prefix + item.name).replace("_", "-"), hints[item.name], item.metadata
        if dataclasses.is_dataclass(kind):
            found.update(values_of(kind, f"{item.name}."))
        elif key in SPECIAL:
            found[key] = SPECIAL[key]
        elif "choices" in rules:
            found[key] = st.sampled_from(rules["choices"])
        elif kind is bool:
            found[key] = st.booleans()
        elif kind is int:
            found[key] = st.integers(rules.get("low", 0), rules.get("high", 10**9))
        elif kind is float:
            found[key] = st.floats(rules.get("low", 0), rules.get("below", 1e300), exclude_min="above" in rules, exclude_max="below" in rules)
        elif kind is str:
            found[key] = TEXT
    return found


MODEL = st.dictionaries(st.sampled_from(["embedding_dim", "l2", "n_layers"]), st.one_of(st.integers(), st.booleans(), st.floats(0, 1), TEXT))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(given_values=st.fixed_dictionaries({}, optional=values_of(Config)), model=MODEL)
def test_what_is_written_comes_back(given_values, model):
    given_values["distillation.enabled"] = False  # else one of its losses must be on
    config = resolve(given_values, {"model": model})
    for key, value in given_values.items():
        if value != "":
            assert config.flat()[key] == value
    assert restore(config.flat()) == config
    assert restore(yaml.safe_load(config.to_yaml())) == config


def test_what_was_resolved_comes_back_whatever_the_files_say_by_then(configs, tmp_path):
    configs("recipes", "mine", distillation={"rho": 2.0})
    config = resolve({"recipe": "mine", "training.epochs": 7})
    (tmp_path / "recipes" / "mine.yaml").unlink()
    configs("backbones", "vbpr", model={"embedding-dim": 8}, training={"epochs": 3})
    assert restore(config.flat()) == config
    assert (config.distillation.rho, config.training.epochs, dict(config.model)) == (2.0, 7, {})


def test_of_several_layers_that_are_restored_the_last_wins(refuses):
    assert restore({"seed": 1, "training": {"epochs": 7}}, {"seed": 2}) == dataclasses.replace(
        Config(), seed=2, training=dataclasses.replace(Config().training, epochs=7)
    )
    refuses(ConfigError, lambda: restore({"training.epoch": 7}), "training.epoch", "did you mean 'training.epochs'")


@pytest.mark.parametrize("kind", ["datasets", "backbones", "recipes"])
def test_the_files_that_are_shipped_are_valid(monkeypatch, kind):
    monkeypatch.setattr(module, "configs_directory", lambda: REAL)
    names = sorted(path.stem for path in (REAL / kind).glob("*.yaml"))
    assert names
    for name in names:
        resolve({kind[:-1]: name})
    if kind == "backbones":
        assert set(names) == set(BACKBONES)


@pytest.mark.parametrize("value", ["2026-01-15", "07:30:00", "2026-01-15T07:30:00", r"C:\data\baby", r"/data/a\b", 'say "a"', "it's", "ä b", "a\tb"])
def test_a_string_reaches_flower_as_it_was_given(value):
    """Of a bare word, a date for example, no more is read than a bool or a number; what is quoted again is read back the same."""
    bare = not any(mark in value for mark in " '\"\t")
    assert parse_overrides([f"name={value}" if bare else f"name='{value}'" if "'" not in value else f'name="{value}"']) == {"name": value}
    again = toml_overrides({"name": value, "training.epochs": 3, "plain": True})
    expected = {"name": value, "training.epochs": 3, "plain": True}
    assert parse_overrides([again]) == expected
    assert parse_config_args([again]) == expected


def test_a_string_with_both_kinds_of_quotes_cannot_be_given_to_flower(refuses):
    refuses(ConfigError, lambda: toml_overrides({"model.weight_mode": "a'b\"c"}), "model.weight-mode is", "both kinds of quotes")


def test_of_several_overrides_the_last_wins_key_by_key(tmp_path):
    """A table of a later file does not take the keys of an earlier one along, and inline overrides are of the same kind."""
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("seed = 1\n[training]\nepochs = 5\nlearning-rate = 0.1\n[model]\nembedding_dim = 8\n")
    second.write_text("[training]\nepochs = 7\nlearning_rate = 0.2\n")
    files = [str(first), str(second)]
    assert parse_overrides(files) == {"seed": 1, "training.epochs": 7, "training.learning_rate": 0.2, "model.embedding_dim": 8}
    assert resolve(parse_overrides(["training.epochs=3", *files])).training.epochs == 7
    assert resolve(parse_overrides([*files, "training.epochs=3 seed=2"])).training.epochs == 3
    assert resolve(parse_overrides([str(first), "training.learning-rate=0.3", str(second)])).training.learning_rate == 0.2
