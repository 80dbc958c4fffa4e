"""From a configuration to trainers: the one place where a role's backbone, seed and triples are put together.

The central loop and the federation's nodes both build through here, which is what makes their results the same.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ckd_fed.backbones.build import build_backbone
from ckd_fed.backbones.kept_graphs import graphs_kept_in
from ckd_fed.config import Config
from ckd_fed.data.dataset import Dataset, dense_features
from ckd_fed.data.missing import hide
from ckd_fed.data.triples import TripleStream, derive_key
from ckd_fed.distillation.objective import DistillationObjective
from ckd_fed.errors import ConfigError
from ckd_fed.kernels import keep_in
from ckd_fed.training.allocator import keep_freed_memory
from ckd_fed.training.balancing import build_balancing
from ckd_fed.training.fit import Fit
from ckd_fed.training.trainer import Trainer

_DEFAULT_THREADS = torch.get_num_threads()
_WORTH_SHARING = 5e8  # multiply-adds of a pass


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: a GPU is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is asked for, but this machine shows {torch.cuda.device_count()} GPUs; use 'auto' or 'cpu'")
    return device


def feature_dtype(config: Config) -> torch.dtype:
    """In which features are held and projected."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.training.feature_dtype]


def triple_stream(config: Config, dataset: Dataset, *, distillation: bool) -> TripleStream:
    """The run's triples; with their distillation part or without."""
    k = config.distillation.batch_size if distillation else 0
    return TripleStream(dataset.train, dataset.fingerprint, config.seed, config.training.batch_size, k)


def learning_rate(config: Config, workers: int) -> float:
    """Of a model that so many workers train.

    Each takes its share of the steps, and their mean moves as far as one of them: a W-th of the way. By default the learning rate grows with W
    (the linear scaling rule, Goyal et al. 2017, arXiv:1706.02677), so that an epoch brings as much as one worker's. Not so the parameters of which
    every worker takes all the steps, one an epoch: those have ``training.learning-rate`` itself.
    """
    scale = config.federation.rate_scale or float(workers)
    return config.training.learning_rate * (scale if workers > 1 else 1.0)


def objective(config: Config) -> DistillationObjective:
    """The configured distillation objective."""
    chosen = config.distillation
    return DistillationObjective(chosen.rho, chosen.kappa, chosen.temperature, chosen.reweight, chosen.specific, chosen.generic)


def build_trainer(
    config: Config,
    dataset: Dataset,
    role: str,
    *,
    distilled: bool = False,
    device: torch.device | None = None,
    share: tuple[int, int] = (0, 1),
    cache: Path | None = None,
) -> Trainer:
    """A trainer with a freshly initialised backbone over the dataset's modalities.

    Args:
        config: the run's configuration.
        dataset: opened with the modalities of the role: one for a teacher, all for a student.
        role: decides the initialisation together with the seed, for example ``"teacher/text"`` or ``"student"``.
        distilled: train on the distillation objective rather than the backbone's own loss.
        device: where to train.
        share: (w, W), this worker's share of the steps; decides its learning rate too, see :func:`learning_rate`.
        cache: folder where what is slow to build and never changes is kept from one process to the next (graphs of nearest items,
            compiled kernels); None for nowhere.
    """
    keep_freed_memory()
    device = device or choose_device(config.training.device)
    dataset = hide(dataset, config.data.hidden_shares, config.seed)
    features = {m: dense_features(dataset, m) for m in dataset.modalities}
    seed = derive_key("ckd-init-1", config.seed, role) & 0x7FFFFFFF
    if cache:
        keep_in(cache / "kernels")
    with graphs_kept_in(cache / "nearest" if cache else None):
        backbone = build_backbone(
            config.backbone, dataset.train, features, config.model, seed=seed, masks=dataset.masks, device=device, feature_dtype=feature_dtype(config)
        )
    # Threads that share small matrices gain nothing, and where another process wants a core they wait for each other at every
    # operation: two of them took 100 times as long as one on the stand-in.
    automatic = _DEFAULT_THREADS if backbone.dense_work > _WORTH_SHARING else 1
    return Trainer(
        backbone,
        dataset,
        triple_stream(config, dataset, distillation=distilled),
        learning_rate=learning_rate(config, share[1]),
        epoch_rate=config.training.learning_rate,
        objective=objective(config) if distilled else None,
        ks=config.ks,
        share=share,
        balancing=build_balancing(config.balancing, backbone) if not distilled and len(dataset.modalities) > 1 else None,
        validation_users=config.training.validation_users,
        threads=config.training.threads or automatic,
        cuda_graphs=config.training.cuda_graphs,
    )


def build_fit(config: Config, trainer: Trainer) -> Fit:
    """The configured epochs, validations and early stopping around a trainer."""
    chosen = config.training
    return Fit(trainer, max_epochs=chosen.epochs, validate_every=chosen.validate_every, patience=chosen.patience)
