"""How long training takes on a GPU: steps started one operation after the other and as recorded CUDA graphs, evaluation, the whole recipe.

    python benchmarks/gpu.py                                   # sizes of Baby with the published features (4096-d, 384-d), made up
    python benchmarks/gpu.py --data DIR --dataset baby --recipe
    python benchmarks/gpu.py --backbones all
    python benchmarks/gpu.py --quick --device cpu              # without a GPU: does it run?

Printed for each backbone and role: milliseconds of a step in an epoch (sampling, the teachers' margins and all uploads included; epochs in turns,
medians), without and with ``training.cuda-graphs``, the ratio, the largest difference that this makes to an epoch's mean losses, and the GPU's
peak memory. An operation that makes the host wait within a step is an error. With ``--recipe``, the wall time of ``ckd-fed train -c 'plain=true'`` of
the first backbone: all teachers, the plain and the distilled student, each to early stopping, tests included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from made_up import BABY, made_up

from ckd_fed.backbones import BACKBONES
from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.training.batches import batches
from ckd_fed.training.build import build_trainer
from ckd_fed.training.central import train
from ckd_fed.training.trainer import Trainer

QUICK = (800, 300, 5_000, {"image": 32, "text": 16})


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within it, whatever makes the host wait for the GPU is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Role:
    """A backbone in one role on a device, ready to train epochs.

    Args:
        config: of the run; its backbone and device count.
        dataset: of all modalities.
        name: ``teacher/<modality>``, ``plain`` or ``distilled``.
        graphs: whether steps are recorded.
    """

    def __init__(self, config: Config, dataset: Dataset, name: str, *, graphs: bool) -> None:
        _, _, modality = name.partition("/")
        mine = dataset.of_modalities((modality,)) if modality else dataset
        chosen = resolve(config.flat(), {"training.cuda-graphs": graphs})
        self.trainer: Trainer = build_trainer(chosen, mine, name if modality else "student", distilled=name == "distilled")
        taught = dataset.modalities if name == "distilled" else ()
        self.tables = {m: build_trainer(config, dataset.of_modalities((m,)), f"teacher/{m}").joint_tables() for m in taught}

    def epoch(self, n: int) -> tuple[float, dict[str, float]]:
        """Seconds of an epoch of n steps, and its means."""
        device = self.trainer.device
        wait(device)
        started = time.perf_counter()
        triples = self.trainer.stream.epoch(0)[:n]
        values = self.trainer.train_epoch(0, self.sheets(triples), triples)
        wait(device)
        return time.perf_counter() - started, values

    def sheets(self, triples: Sequence[StepTriples]) -> dict[str, np.ndarray] | None:
        return {m: margin_sheet(table, triples, np.dtype(np.float16)) for m, table in self.tables.items()} or None

    def check(self) -> None:
        """See that in the third step of an epoch the host does not wait for a GPU, which is an error there."""
        trainer = self.trainer
        triples = trainer.stream.epoch(0)[:3]
        like = next(trainer.backbone.parameters())
        trainer.backbone.train()
        trainer.backbone.start_epoch(0, torch.Generator().manual_seed(0))
        *before, last = batches(triples, self.sheets(triples), trainer.dataset.masks, like.device, like.dtype)
        for packed in before:
            trainer.step(packed)
        with no_waiting(trainer.device) if trainer.backbone.static_steps else nullcontext():
            trainer.step(last)


def peak(device: torch.device) -> str:
    """Peak memory of the GPU's tensors since the last call, in MB."""
    if device.type != "cuda":
        return ""
    mb = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return f"{mb:.0f}"


def step_row(config: Config, dataset: Dataset, name: str, steps: int, rounds: int) -> str:
    """A role's row of the table."""
    device = torch.device(config.training.device)
    sides = [Role(config, dataset, name, graphs=graphs) for graphs in (False, True)]
    sides[0].check()
    n = min(steps, len(sides[0].trainer.stream.epoch(0)))
    del sides[0]
    sides.insert(0, Role(config, dataset, name, graphs=False))  # from the same parameters as the other
    seconds: tuple[list[float], list[float]] = ([], [])
    difference = 0.0
    peak(device)
    for turn in range(rounds + 1):
        done = [side.epoch(n) for side in sides]
        if turn:  # the first sets up libraries
            for of_side, (spent, _) in zip(seconds, done, strict=True):
                of_side.append(spent)
        (_, ours), (_, theirs) = done
        difference = max(difference, *(abs(ours[key] - theirs[key]) / max(abs(ours[key]), 1e-6) for key in ours if key.startswith("loss/")))
    plain, recorded = (1000 * statistics.median(of_side) / n for of_side in seconds)
    cells = [f"{plain:.3f}", "not recorded", "", ""]
    if sides[1].trainer.records_steps:
        cells[1:] = [f"{recorded:.3f}", f"{plain / recorded:.1f}", f"{difference:.0e}"]
    return f"| {config.backbone} | {name} | {' | '.join(cells)} | {peak(device)} |"


def evaluation_row(config: Config, dataset: Dataset, rounds: int) -> str:
    """Seconds of a validation, of the joint view and of all."""
    trainer = Role(config, dataset, "plain", graphs=False).trainer

    def seconds(all_views: bool) -> float:
        found = []
        for _ in range(rounds + 1):
            wait(trainer.device)
            started = time.perf_counter()
            (trainer.diagnose if all_views else trainer.rank)(dataset.val).compute()
            found.append(time.perf_counter() - started)
        return statistics.median(found[1:])

    return f"| {config.backbone} | {seconds(False):.3f} | {seconds(True):.3f} |"


def recipe(config: Config) -> str:
    """Wall time of the whole recipe, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        changed = {"home": folder, "plain": True, "tracking.wandb": "off", "tracking.report": False, "training.cuda-graphs": True}
        started = time.perf_counter()
        result = train(resolve(config.flat(), changed), write=lambda line: None)
        spent = time.perf_counter() - started
    found = ", ".join(f"{role} {outcome.epochs} epochs, test Recall@20 {outcome.test['recall@20']:.4f}" for role, outcome in result.outcomes.items())
    return f"{config.backbone}, {config.dataset}, whole recipe: {spent:.1f} s ({found})"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the dataset's folder; without it, data of Baby's sizes are made up")
    parser.add_argument("--dataset", default="baby")
    parser.add_argument("--backbones", nargs="+", default=["vbpr", "mmgcn"], choices=[*sorted(BACKBONES), "all"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--features", default="float32", choices=["float32", "bfloat16"], help="training.feature-dtype")
    parser.add_argument("--steps", type=int, default=117, help="an epoch, at most")
    parser.add_argument("--rounds", type=int, default=5, help="epochs timed of each side")
    parser.add_argument("--recipe", action="store_true", help="also time the whole recipe; needs --data")
    parser.add_argument("--epochs", type=int, default=1000, help="of each model in the recipe, at most")
    parser.add_argument("--quick", action="store_true", help="small data, two rounds: does it run?")
    arguments = parser.parse_args(given)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device is {arguments.device!r}, and this machine shows no GPU; --device cpu --quick shows whether the script runs")
    if arguments.recipe and not arguments.data:
        raise SystemExit("--recipe needs --data: made-up data have nothing to stop early by")
    if arguments.quick:
        arguments.steps, arguments.rounds = 4, 2
    base: dict[str, object] = {"training.device": arguments.device, "training.feature-dtype": arguments.features, "distillation.rho": 1.0}
    base["training.epochs"] = arguments.epochs
    if arguments.data:
        base.update({"dataset": arguments.dataset, "data.dir": str((arguments.data / arguments.dataset).resolve())})
    dataset = open_dataset(resolve(base, {})) if arguments.data else made_up(*QUICK if arguments.quick else BABY)  # type: ignore[arg-type]
    cuda = arguments.device.startswith("cuda")
    print(f"{dataset.describe()}\n{torch.cuda.get_device_name(arguments.device) if cuda else 'CPU'}, torch {torch.__version__}\n")
    names = sorted(BACKBONES) if "all" in arguments.backbones else arguments.backbones
    configs = [resolve({**base, "backbone": name}, {}) for name in names]  # type: ignore[arg-type]
    roles = [*(f"teacher/{m}" for m in dataset.modalities), "plain", "distilled"]
    print("| backbone | role | step, ms | step with CUDA graphs, ms | ratio | largest relative difference of the losses | peak memory of both, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for config in configs:
        for role in roles:
            print(step_row(config, dataset, role, arguments.steps, arguments.rounds), flush=True)
    print("\n| backbone | evaluation, joint, s | all views, s |\n|---|---|---|", flush=True)
    for config in configs:
        print(evaluation_row(config, dataset, arguments.rounds), flush=True)
    if arguments.recipe:
        print(f"\n{recipe(configs[0])}")


if __name__ == "__main__":
    main()
