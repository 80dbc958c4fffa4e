"""The validated configuration of a run.

Values come in layers, later ones winning: the defaults below, ``configs/datasets/<dataset>.yaml``, ``configs/backbones/<backbone>.yaml``,
on the stand-in ``configs/datasets/<dataset>-standin.yaml``, ``configs/recipes/<recipe>.yaml``, the simulation's ``[tool.flwr.app.config]``, and
``--run-config``. Keys are dotted
(``training.learning-rate``), hyphens and underscores are the same, and an empty string means "not set here".
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ckd_fed.backbones import backbone_target
from ckd_fed.errors import ConfigError, unknown

Scalar = bool | int | float | str


def configs_directory() -> Path:
    """Where ``configs/`` is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def is_folder_name(name: object) -> bool:
    """Whether something is the name of a folder within another, and no way out of it or to a hidden one."""
    return isinstance(name, str) and name != "" and name.isprintable() and not any(mark in name for mark in "/\\") and not name.startswith(".")


def _positive(**more: Any) -> Any:
    return field(metadata={"above": 0}, **more)


def _at_least(low: float, **more: Any) -> Any:
    return field(metadata={"low": low}, **more)


def _one_of(*choices: str, **more: Any) -> Any:
    return field(metadata={"choices": choices}, **more)


@dataclass(frozen=True)
class DataConfig:
    """``data.*``: where the dataset is and which modalities are used."""

    dir: str = ""  # dataset folder; a node's own data-dir wins; by default <home>/data/<dataset>
    modalities: str = ""  # comma-separated; by default all that the students have
    standin: str = _one_of("auto", "always", "never", default="auto")  # auto: where the real set is not there
    missing: str = ""  # for studies: hide a modality of a share of the items, for example "audio:0.3,text:0.1"

    def __post_init__(self) -> None:
        _ = self.hidden_shares  # raises for a value that cannot be read

    @property
    def hidden_shares(self) -> Mapping[str, float]:
        """Modality -> share of its items to hide."""
        shares: dict[str, float] = {}
        for entry in filter(None, (entry.strip() for entry in self.missing.split(","))):
            modality, _, text = entry.rpartition(":")
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if not modality or modality in shares or not 0 <= share <= 1:
                raise ConfigError(f"data.missing is {self.missing!r}; name each modality once with a share from 0 to 1, for example 'audio:0.3'")
            shares[modality] = share
        return shares


@dataclass(frozen=True)
class TrainingConfig:
    """``training.*``: the published protocol by default."""

    learning_rate: float = _positive(default=5e-4)
    batch_size: int = _at_least(1, default=1024)  # B
    epochs: int = _at_least(1, default=1000)  # at most
    validate_every: int = _at_least(1, default=5)  # epochs; also the length of a distillation round
    patience: int = _at_least(0, default=10)  # validations without a gain that are tolerated
    validation_users: int = _at_least(0, default=0)  # that a validation ranks for at most, always the same; 0: all. The test is for all
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:N; a node's own device wins
    feature_dtype: str = _one_of("float32", "bfloat16", default="float32")  # in which features are held and projected; parameters are float32
    threads: int = _at_least(0, default=0)  # CPU threads of a training process; 0: torch's default, or 1 where the matrices are small


@dataclass(frozen=True)
class DistillationConfig:
    """``distillation.*``: the symbols of the paper, and switches for ablation."""

    enabled: bool = True  # false: no teachers, the student is a plain one
    rho: float = _at_least(0, default=0.01)  # weight of distillation as a whole
    kappa: float = _at_least(0, default=5.0)  # weight of the generic loss
    temperature: float = _positive(default=0.1)  # t of the generic loss
    batch_size: int = _at_least(1, default=5000)  # K
    reweight: bool = True  # counterfactual weights; false: every modality weighs 1
    specific: bool = True
    generic: bool = True
    margin_dtype: str = _one_of("float16", "float32", default="float16")  # of the soft scores
    margin_bound: float = _positive(default=65504.0)  # larger margins are clipped to it; by default the largest float16


@dataclass(frozen=True)
class BalancingConfig:
    """``balancing.*``: published ways of balancing without teachers, for the plain student (:mod:`ckd_fed.training.balancing`)."""

    method: str = _one_of("none", "gradient-modulation", "modality-dropout", default="none")
    alpha: float = _at_least(0, default=0.5)  # of gradient modulation
    noise: bool = True  # of gradient modulation (GE)
    rate: float = field(default=0.3, metadata={"low": 0, "below": 1})  # of modality dropout: probability of a modality's absence


@dataclass(frozen=True)
class EvaluationConfig:
    """``evaluation.*``."""

    ks: str = "10,20"  # cut-offs, comma-separated; 20 must be among them, early stopping uses Recall@20
    calibrate: bool = False  # at the end, also rank by the sum of a student's views under weights fitted on validation
    user_table: bool = True  # keep every test user's metrics, which `ckd-fed compare` pairs; in a federation nodes send them to the server


@dataclass(frozen=True)
class FederationConfig:
    """``federation.*``: enrolment and rounds; the central loop ignores it."""

    student_workers: int = _at_least(1, default=1)  # students at most; further nodes stay spare
    rate_scale: float = _at_least(0, default=0.0)  # of several students' training.learning-rate; 0: by their number, 1: not at all
    teacher_epochs: int = _at_least(1, default=50)  # epochs of a teacher round, rounded up to whole validations
    messaging_share: float = _at_least(0, default=0.1)  # of rounds' time: a lone student's grow until it is so, several are told; 1: never
    stretch_mb: float = _positive(default=64.0)  # margins of a round that a teacher sends a modality, in MB at most (an epoch at least)
    enrol_timeout: float = _positive(default=120.0)  # seconds to wait for the nodes needed
    reply_timeout: float = _positive(default=3600.0)  # seconds to wait for a round's replies
    retry_limit: int = _at_least(0, default=3)  # times that a failed request is sent again
    retry_pause: float = _positive(default=5.0)  # seconds before the first of them; doubled each time
    node_timeout: float = _positive(default=600.0)  # seconds to wait for a node that is gone to come back
    on_lost_teacher: str = _one_of("wait", "drop", "fail", default="fail")  # beyond these limits


@dataclass(frozen=True)
class TrackingConfig:
    """``tracking.*``."""

    wandb: str = _one_of("auto", "online", "offline", "off", default="auto")  # auto: online with a key, else offline
    project: str = "ckd_fed"
    group: str = ""
    tags: str = ""  # comma-separated
    report: bool = True  # write report/report.html at the end


@dataclass(frozen=True)
class Config:
    """A run's configuration, complete and checked.

    Attributes:
        dataset: name of the dataset.
        backbone: name of the backbone, or ``module:Class`` for one of one's own.
        seed: decides triples and initialisation.
        plain: also train the plain student, to compare.
        recipe: name of a file in configs/recipes.
        name: of the run; by default made of dataset, backbone and the time.
        resume: name of a run to go on with; its own configuration counts then.
        home: where data, runs and workspaces live; by default $CKD_FED_HOME or ~/.ckd_fed. Real nodes have their own.
        model: the backbone's options (``model.*``).
    """

    dataset: str = "baby"
    backbone: str = "vbpr"
    seed: int = _at_least(0, default=123)
    plain: bool = False
    recipe: str = ""
    name: str = ""
    resume: str = ""
    home: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: Mapping[str, Scalar] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.dataset or any(mark in self.dataset for mark in "/\\") or self.dataset.startswith("."):
            raise ConfigError(f"dataset is {self.dataset!r}; a plain name such as 'baby' is needed (use data.dir for a folder elsewhere)")
        backbone_target(self.backbone)  # raises for an unknown name
        for key, name in {"name": self.name, "resume": self.resume}.items():
            if name and not is_folder_name(name):
                raise ConfigError(f"{key} is {name!r}; a run's name is a plain folder name")
        ks = self.ks
        if 20 not in ks:
            raise ConfigError(f"evaluation.ks is {self.evaluation.ks!r}; 20 must be among the cut-offs, because early stopping uses Recall@20")
        if len(self.modalities) != len(set(self.modalities)):
            raise ConfigError(f"data.modalities is {self.data.modalities!r}; a modality is named twice")
        if self.distillation.enabled and not (self.distillation.specific or self.distillation.generic):
            raise ConfigError("distillation.specific and distillation.generic are both false; set distillation.enabled=false for no distillation")
        _check_device(self.training.device)

    @property
    def ks(self) -> tuple[int, ...]:
        """Cut-offs, ascending."""
        try:
            ks = tuple(sorted({int(k) for k in self.evaluation.ks.split(",")}))
        except ValueError:
            ks = (0,)
        if ks[0] < 1:
            raise ConfigError(f"evaluation.ks is {self.evaluation.ks!r}; give positive whole numbers separated by commas, for example '10,20'")
        return ks

    @property
    def teacher_round(self) -> int:
        """Epochs of a teacher round: ``federation.teacher-epochs`` rounded up to whole validations, so that every round has one."""
        every = self.training.validate_every
        return -(-self.federation.teacher_epochs // every) * every

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities asked for; empty means all that are there."""
        return tuple(name.strip() for name in self.data.modalities.split(",") if name.strip())

    def flat(self) -> dict[str, Scalar]:
        """Every key with its value, dotted and hyphenated: what :func:`restore` takes back."""
        return {key.replace("_", "-") if not key.startswith("model.") else key: value for key, value in _walk(self, "")}

    def to_yaml(self) -> str:
        """As written into a run's directory."""
        tree: dict[str, Any] = {}
        for key, value in self.flat().items():
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = value
        return yaml.safe_dump(tree, sort_keys=False)


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in device and not (kind == "cuda" and index.isascii() and index.isdecimal())):
        raise ConfigError(unknown("training.device", device, ["auto", "cpu", "cuda", "cuda:N"]))


def _walk(config: Any, prefix: str) -> Iterator[tuple[str, Scalar]]:
    for item in fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        elif isinstance(value, Mapping):
            yield from ((f"{prefix}{item.name}.{key}", option) for key, option in value.items())
        else:
            yield f"{prefix}{item.name}", value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys with underscores; values are left as they are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def resolve(*layers: Mapping[str, Any], standin: bool = False) -> Config:
    """Resolve a configuration from layers of overrides, the last one winning, over the files in ``configs/`` and the defaults.

    Args:
        layers: nested or dotted keys.
        standin: the dataset is the generated stand-in, so ``configs/datasets/<dataset>-standin.yaml`` counts too, above the other files.

    Raises:
        ConfigError: an unknown key or an impossible value; the message names the key, the value and the choices.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given.update({key: value for key, value in flatten(layer).items() if value != ""})
    defaults = Config()
    names = {key: str(given.get(key, getattr(defaults, key))) for key in ("dataset", "backbone", "recipe")}
    values: dict[str, Any] = {}
    recipe = read_recipe(names["recipe"]) if names["recipe"] else {}
    for key in ("dataset", "backbone"):  # a recipe may choose them too, unless they are given
        if key not in given and key in recipe:
            names[key] = str(recipe[key])
    backbone_target(names["backbone"])
    for path in (configs_directory() / "datasets" / f"{names['dataset']}.yaml", configs_directory() / "backbones" / f"{names['backbone']}.yaml"):
        if path.is_file():
            values.update(_read_yaml(path))
    adapted = configs_directory() / "datasets" / f"{names['dataset']}-standin.yaml"
    if standin and adapted.is_file():
        values.update(_read_yaml(adapted))
    values.update(recipe)
    values.update(given)
    return _build(values)


def restore(*layers: Mapping[str, Any]) -> Config:
    """A configuration that was resolved before, from its own values (:meth:`Config.flat`, a run's ``config.yaml``) and nothing else.

    No file in ``configs/`` counts: on another machine, or on another day, they may say something else or be missing.

    Args:
        layers: nested or dotted keys, the last one winning.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """
    return _build({key: value for layer in layers for key, value in flatten(layer).items()})


def read_recipe(name: str) -> dict[str, Any]:
    """Overrides of a recipe."""
    path = configs_directory() / "recipes" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(unknown("recipe", name, (p.stem for p in path.parent.glob("*.yaml"))))
    return _read_yaml(path)


class _Loader(yaml.SafeLoader):
    """PyYAML takes ``1e-3`` for a text, as YAML 1.1 has it; here it is the number that YAML 1.2 and everybody else take it for."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_yaml(path: Path) -> Any:
    """What a YAML file written by a person holds.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return yaml.load(path.read_text(), Loader=_Loader)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return {key: value for key, value in flatten(tree).items() if value != ""}


def _build(values: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {"": {}}
    hints = get_type_hints(Config)
    names = {item.name for item in fields(Config)}
    choices = sorted(key.replace("_", "-") for key, _ in _walk(Config(), ""))
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section == "model":
            if not isinstance(value, (bool, int, float, str)):
                raise ConfigError(f"model.{name} is {value!r}; a number, a string or true/false is needed")
            sections.setdefault("model", {})[name] = value
            continue
        owner = hints.get(section) if section else Config
        member = None
        if isinstance(owner, type) and dataclasses.is_dataclass(owner) and (section in names or not section):
            member = next((item for item in fields(owner) if item.name == name and not dataclasses.is_dataclass(get_type_hints(owner)[name])), None)
        if member is None or name == "model":
            raise ConfigError(unknown("configuration key", key.replace("_", "-"), [*choices, "model.<option>"]))
        assert isinstance(owner, type)
        sections.setdefault(section, {})[name] = _convert(key.replace("_", "-"), value, get_type_hints(owner)[name], member.metadata)
    built = {name: hints[name](**entries) if name != "model" else entries for name, entries in sections.items() if name}
    everything: dict[str, Any] = {**sections[""], **built}
    return Config(**everything)


def _convert(key: str, value: Any, kind: type, rules: Mapping[str, Any]) -> Scalar:
    if kind is bool:
        good = isinstance(value, bool)
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        value = float(value) if good else value
    else:
        good = isinstance(value, str)
    if not good:
        expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]
        raise ConfigError(f"{key} is {value!r}; {expected} is needed")
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(unknown(key, value, rules["choices"]))
    if "above" in rules and not value > rules["above"]:
        raise ConfigError(f"{key} is {value!r}; it must be greater than {rules['above']}")
    if "below" in rules and not value < rules["below"]:
        raise ConfigError(f"{key} is {value!r}; it must be less than {rules['below']}")
    if kind is int and value >= 2**63:
        raise ConfigError(f"{key} is {value!r}; a whole number below 2**63 is needed")
    if "low" in rules and not value >= rules["low"]:
        raise ConfigError(f"{key} is {value!r}; it must be at least {rules['low']}")
    return value
