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
_LARGEST_BATCH = 1 << 24


def configs_directory() -> Path:
    """Where ``configs/`` is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def is_folder_name(name: object) -> bool:
    """Whether something is the name of a folder within another, and no way out of it or to a hidden one."""
    return isinstance(name, str) and name != "" and name.isprintable() and not any(mark in name for mark in "/\\") and not name.startswith(".")


def _plain(*, default: Scalar, help: str, **rules: Any) -> Any:
    """A field with what ``ckd-fed config --keys`` says of it; ``allowed`` among the rules is said in place of the type."""
    return field(default=default, metadata={"help": help, **rules})


def _positive(**more: Any) -> Any:
    return _plain(above=0, **more)


def _at_least(low: float, **more: Any) -> Any:
    return _plain(low=low, **more)


def _one_of(*choices: str, **more: Any) -> Any:
    return _plain(choices=choices, **more)


@dataclass(frozen=True)
class DataConfig:
    """``data.*``: where the dataset is and what is used of it."""

    dir: str = _plain(
        default="",
        allowed="absolute path",
        help="Folder of the dataset. The `data-dir` of a node takes precedence. Empty: `<home>/data/<dataset>`.",
    )
    modalities: str = _plain(default="", allowed="names separated by commas", help="Modalities to use. Empty: all that the students have.")
    standin: str = _one_of(
        "auto", "always", "never", default="auto", help="Whether to use the generated stand-in. auto: only where the real dataset is missing."
    )
    missing: str = _plain(
        default="",
        allowed="`modality:share` pairs separated by commas",
        help="For studies: hides a modality of a share of the items, for example `audio:0.3,text:0.1`. Shares are from 0 to 1.",
    )

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
    """``training.*``: how every model is trained; the defaults are the published protocol."""

    learning_rate: float = _positive(default=5e-4, help="Learning rate of Adam.")
    batch_size: int = _at_least(
        1, high=_LARGEST_BATCH, default=1024, help="Number of triples (user, positive item, negative item) in a ranking batch: B."
    )
    epochs: int = _at_least(1, default=1000, help="Number of epochs, at most. Early stopping can end training before.")
    validate_every: int = _at_least(
        1, default=5, help="Number of epochs from one validation to the next. In a federation a distillation round normally ends with a validation."
    )
    patience: int = _at_least(
        0, default=10, help="Number of validations in a row without a gain in Recall@20 that are tolerated. Training stops at the next one."
    )
    validation_users: int = _at_least(
        0, default=0, help="Number of users that a validation ranks items for, at most; always the same ones. 0: all. The test is always for all."
    )
    device: str = _plain(
        default="auto",
        allowed="auto, cpu, cuda or cuda:N",
        help="Where to train. auto: the first GPU, or the CPU where there is none. The `device` of a node takes precedence.",
    )
    feature_dtype: str = _one_of(
        "float32",
        "bfloat16",
        default="float32",
        help="Type in which features are held and projected. Parameters are float32. bfloat16 is for `vbpr`, `mmgcn`, `grcn` and `egogcn`.",
    )
    cuda_graphs: bool = _plain(
        default=False,
        help="Whether a GPU records a step once an epoch and replays it, instead of being told each operation anew. "
        "Without effect on a CPU, for `bm3`, and with balancing.",
    )
    threads: int = _at_least(
        0, high=1024, default=0, help="Number of CPU threads of a training process. 0: torch's default, or 1 where the matrices are small."
    )


@dataclass(frozen=True)
class DistillationConfig:
    """``distillation.*``: how the student learns from the teachers; symbols are those of the paper."""

    enabled: bool = _plain(default=True, help="Whether to distil. false: no teachers are trained, and the student is a plain one.")
    rho: float = _at_least(0, default=0.01, help="Weight of the distillation losses in the student's loss.")
    kappa: float = _at_least(0, default=5.0, help="Weight of the generic loss beside the specific loss.")
    temperature: float = _positive(default=0.1, help="Temperature t of the generic loss.")
    batch_size: int = _at_least(1, high=_LARGEST_BATCH, default=5000, help="Number of random item pairs in a distillation batch: K.")
    reweight: bool = _plain(default=True, help="Whether modalities are weighted by their causal effects. false: each has the weight 1.")
    specific: bool = _plain(default=True, help="Whether to use the specific loss (on the ranking batch).")
    generic: bool = _plain(default=True, help="Whether to use the generic loss (on the distillation batch).")
    margin_dtype: str = _one_of("float16", "float32", default="float16", help="Type in which teachers send their score margins.")
    margin_bound: float = _positive(
        default=65504.0, help="Largest absolute value of a margin that is sent; larger ones are clipped. The default is the largest float16."
    )


@dataclass(frozen=True)
class BalancingConfig:
    """``balancing.*``: published ways to balance the modalities of a plain student without teachers."""

    method: str = _one_of(
        "none",
        "gradient-modulation",
        "modality-dropout",
        default="none",
        help="gradient-modulation (OGM-GE) slows down the modality that is ahead. modality-dropout leaves out modalities at random.",
    )
    alpha: float = _at_least(0, default=0.5, help="Strength of gradient modulation.")
    noise: bool = _plain(default=True, help="Whether gradient modulation adds noise to the gradients (GE).")
    rate: float = _plain(default=0.3, low=0, below=1, help="Probability that modality dropout leaves out a modality of a sample.")


@dataclass(frozen=True)
class EvaluationConfig:
    """``evaluation.*``: what is measured."""

    ks: str = _plain(
        default="10,20",
        allowed="whole numbers separated by commas",
        help="Cut-offs k of the metrics. 20 must be among them, because early stopping uses Recall@20.",
    )
    calibrate: bool = _plain(
        default=False, help="Whether to also rank, at the end, by a weighted sum of the student's views. The weights are fitted on validation data."
    )
    user_table: bool = _plain(
        default=True,
        help="Whether to keep the metrics of every test user, which `ckd-fed compare` needs. In a federation the nodes send them to the server.",
    )


@dataclass(frozen=True)
class FederationConfig:
    """``federation.*``: nodes, rounds and waiting times; ``ckd-fed train`` ignores them."""

    student_workers: int = _at_least(1, default=1, help="Number of nodes that train the student together, at most. Further nodes stay spare.")
    rate_scale: float = _at_least(
        0,
        default=0.0,
        help="Factor of `training.learning-rate` where several nodes train the student. 0: their number. 1: the rate stays as it is. "
        "It is not for what has one gradient an epoch (the learned graphs of `lattice` and `micro`).",
    )
    teacher_epochs: int = _at_least(1, default=50, help="Number of epochs of a teacher round, rounded up to a multiple of `training.validate-every`.")
    messaging_share: float = _at_least(
        0,
        default=0.1,
        help="Share of the rounds' time that messages may take. With one student node the rounds grow until they keep to it; with several, "
        "the log says which length would. 1: the rounds stay short.",
    )
    stretch_mb: float = _positive(
        default=64.0,
        help="Size in MB of a modality's margins that a teacher sends in a round, at most. One epoch is sent in any case, however large.",
    )
    enrol_timeout: float = _positive(default=120.0, help="Seconds to wait at the start for the nodes that are needed.")
    reply_timeout: float = _positive(default=3600.0, help="Seconds to wait for the reply to a request.")
    retry_limit: int = _at_least(0, default=3, help="Number of times that a failed request is sent again.")
    retry_pause: float = _positive(default=5.0, help="Seconds before a failed request is sent again. Each further pause is twice as long.")
    node_timeout: float = _positive(default=600.0, help="Seconds to wait for a lost node to come back.")
    on_lost_teacher: str = _one_of(
        "wait",
        "drop",
        "fail",
        default="fail",
        help="What happens when a teacher is lost, after all repetitions and waiting. wait: the run waits on. drop: it goes on with the other "
        "teachers. fail: it ends, and can be resumed.",
    )


@dataclass(frozen=True)
class TrackingConfig:
    """``tracking.*``: Weights & Biases and the report."""

    wandb: str = _one_of(
        "auto", "online", "offline", "off", default="auto", help="How Weights & Biases is used. auto: online where there is an API key, else offline."
    )
    project: str = _plain(default="ckd_fed", help="Project in Weights & Biases.")
    group: str = _plain(default="", help="Group in Weights & Biases. Empty: `<dataset>-<backbone>`.")
    tags: str = _plain(default="", allowed="words separated by commas", help="Tags in Weights & Biases, beside dataset, backbone and recipe.")
    artifacts: bool = _plain(default=True, help="Whether Weights & Biases also gets the best student's parameters and the configuration as files.")
    report: bool = _plain(default=True, help="Whether to write `report/report.html` at the end.")


@dataclass(frozen=True)
class Config:
    """A run's configuration, complete and checked; ``model`` holds the backbone's options (``model.*``), named as its constructor has them."""

    dataset: str = _plain(default="baby", allowed="name of a folder", help="Name of the dataset.")
    backbone: str = _plain(default="vbpr", allowed="name, or `module:Class`", help="Name of the backbone, or `module:Class` for one of your own.")
    seed: int = _at_least(0, default=123, help="Decides the training triples and the initial parameters.")
    plain: bool = _plain(default=False, help="Whether to also train the plain student (without teachers), to compare with.")
    recipe: str = _plain(default="", allowed="name of a recipe", help="File in `configs/recipes`: an ablation such as `no-specific`, or a baseline.")
    name: str = _plain(default="", allowed="name of a folder", help="Name of the run. Empty: made of dataset, backbone and time.")
    resume: str = _plain(default="", allowed="name of a run", help="Run to go on with. The run's own configuration counts then.")
    home: str = _plain(
        default="",
        allowed="absolute path",
        help="Folder of data, runs and workspaces. Empty: `$CKD_FED_HOME`, or `~/.ckd_fed` where that is not set. Real nodes have their own.",
    )
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
        check_device(self.training.device)

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
        return {key.replace("_", "-"): value for key, value in _walk(self, "")}

    def to_yaml(self) -> str:
        """As written into a run's directory."""
        tree: dict[str, Any] = {}
        for key, value in self.flat().items():
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = value
        return yaml.safe_dump(tree, sort_keys=False)


def check_device(device: str, key: str = "training.device") -> None:
    """See that a device is one that a machine could have.

    Raises:
        ConfigError: it is none of auto, cpu, cuda and cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?", device):  # torch counts devices in a byte
        raise ConfigError(unknown(key, device, ["auto", "cpu", "cuda", "cuda:N"]))


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
    if ":" in str(values.get("name", "")):
        raise ConfigError(f"name is {values['name']!r}; a run's name has no colon, because RUN:MODEL is how one of its models is named")
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
    folder = configs_directory() / "recipes"
    if not is_folder_name(name) or not (folder / f"{name}.yaml").is_file():
        raise ConfigError(unknown("recipe", name, (path.stem for path in folder.glob("*.yaml"))))
    return _read_yaml(folder / f"{name}.yaml")


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
                raise ConfigError(f"{key.replace('_', '-')} is {value!r}; a number, a string or true/false is needed")
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
        hint = f", for example {key}='\"{value}\"'" if kind is str and isinstance(value, (int, float)) else ""
        raise ConfigError(f"{key} is {value!r}; {expected} is needed{hint}")
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
    if "high" in rules and not value <= rules["high"]:
        raise ConfigError(f"{key} is {value!r}; it must be at most {rules['high']}")
    return value
