"""How fast a training step and an evaluation are, as ratios to the same mathematics in the published manner, in one run.

    python benchmarks/speed.py --threads 2                                     # sizes of Baby with the published features (4096-d, 384-d)
    python benchmarks/speed.py --threads 2 --data DIR --dataset tiktok
    python benchmarks/speed.py --quick

For every case both sides start from the same parameters; their losses on the same triples are compared first (relative difference,
which must be under 1e-5; under 1e-3 with ``--features bfloat16``, which ours alone has then), then rounds of steps are timed in turns, sampling
and the teachers' margins included. A time is that of the median round; a ratio is the median of the rounds' own, since a machine may be faster in
one round than in the next.
``naive.py`` is the published manner. The rows of an epoch and of the whole recipe (a teacher a modality, the plain and the distilled student,
``--epochs`` each, validated as configured) are estimated from the steps and evaluations above them. With ``--memory`` each side of each case
also runs in a process of its own, whose peak resident memory is printed (Linux). ``--profile`` prints where our distillation steps spend
their time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import naive
import numpy as np
import torch
from made_up import BABY, made_up
from memory import peak_mb
from torch import Tensor

from ckd_fed.backbones.base import Embeddings, Triples
from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import margin_sheet
from ckd_fed.distillation.objective import PlainObjective
from ckd_fed.training.batches import batches
from ckd_fed.training.build import build_trainer
from ckd_fed.training.trainer import Trainer

FLOAT32 = np.dtype(np.float32)
ROLES = ("teacher", "plain", "distilled")
SAME = {"float32": 1e-5, "bfloat16": 1e-3}  # relative difference of the losses under which both sides compute the same


def tensors(triples: np.ndarray) -> naive.Batch:
    user, first, second = torch.from_numpy(triples).long()
    return user, first, second


@dataclass
class Case:
    """One backbone in one role, trained by both sides.

    Attributes:
        name: for example ``vbpr distilled``.
        config, dataset: of both sides.
        backbone: ``vbpr`` or ``mmgcn``.
        role: one of :data:`ROLES`. VBPR's teacher in the published manner is, as there, the model of all modalities with the others absent;
            their constant blocks change no margin, so both learn the same. MMGCN's branches do not cancel: there both sides have the one
            modality.
        modality: of a teacher.
    """

    name: str
    config: Config
    dataset: Dataset
    backbone: str
    role: str
    modality: str = ""

    def build(self, side: str = "both") -> None:
        """Models, teachers and optimisers; of one side, ``ours`` or ``naive``, where its memory is measured."""
        config = resolve(self.config.flat(), {"backbone": self.backbone, "training.device": "cpu"})
        of_role = self.dataset.of_modalities((self.modality,)) if self.role == "teacher" else self.dataset
        exact = resolve(config.flat(), {"training.feature-dtype": "float32"})
        self.ours = build_trainer(exact if side == "naive" else config, of_role, self.role, distilled=self.role == "distilled")
        self.theirs = self.ours
        self.present: tuple[str, ...] = of_role.modalities
        if side == "both" or (side == "naive" and self.absent):
            self.theirs = build_trainer(exact, self.dataset if self.absent else of_role, self.role)
            self.model.load_state_dict(self.ours.backbone.state_dict(), strict=not self.absent)
        self.adjacency = naive.coordinate_adjacency(self.dataset.train) if self.backbone == "mmgcn" and side != "ours" else None
        self.tables: dict[str, Embeddings] = {}
        self.teachers: dict[str, Embeddings | naive.Model] = {}
        if self.role == "distilled":
            for m in self.dataset.modalities:
                trainer = build_trainer(exact, self.dataset.of_modalities((m,)), f"teacher/{m}")
                self.tables[m] = trainer.joint_tables()
                # As published: a graph teacher is passed over the catalogue in every step; VBPR's tables are looked up.
                self.teachers[m] = trainer.backbone if self.adjacency is not None else self.tables[m]  # type: ignore[assignment]
        if side != "ours":
            self.sampler = naive.Sampler(of_role, config)
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.training.learning_rate)
        torch.set_num_threads(config.training.threads)

    @property
    def absent(self) -> bool:
        """Whether the published manner has modalities here that are absent."""
        return self.role == "teacher" and self.backbone == "vbpr"

    @property
    def model(self) -> naive.Model:
        return self.theirs.backbone  # type: ignore[return-value]

    def naive_loss(self, ranking: naive.Batch, pairs: naive.Batch | None) -> Tensor:
        if pairs is None:
            return naive.plain_loss(self.model, ranking, self.adjacency, self.present)
        return naive.distillation_loss(self.model, self.teachers, ranking, pairs, self.config, self.adjacency)

    def train_naive(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.naive_loss(self.sampler.ranking(), self.sampler.pairs() if self.tables else None)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def train_ours(self, steps: int) -> None:
        triples = [self.ours.stream.step(0, step) for step in range(steps)]
        self.ours.train_epoch(0, self.sheets(triples), triples)

    def sheets(self, triples: Sequence[StepTriples]) -> dict[str, np.ndarray] | None:
        return {m: margin_sheet(table, triples, FLOAT32) for m, table in self.tables.items()} or None

    def difference(self) -> float:
        """Relative difference of the two losses on the same triples."""
        triples = self.ours.stream.step(0, 0)
        ranking, pairs = tensors(triples.ranking), tensors(triples.distillation)
        theirs = float(self.naive_loss(ranking, pairs if self.tables else None).detach())
        if self.absent:
            theirs -= float(naive.absent_l2(self.model, self.present).detach())  # type: ignore[arg-type]
        sheets = self.sheets([triples])
        if sheets is None or self.ours.objective is None:
            ours = float(PlainObjective()(self.ours.backbone, Triples(*ranking)).loss.detach())
        else:
            (packed,) = batches([triples], sheets, {}, torch.device("cpu"), torch.float32)
            ours = float(self.ours.objective(self.ours.backbone, Triples(*ranking), Triples(*pairs), packed.batch().margins).loss.detach())
        return abs(ours - theirs) / abs(theirs)


class Turns(NamedTuple):
    """Seconds of the published manner and of ours, each of the median round, and the median ratio of the two in one round."""

    theirs: float
    ours: float
    ratio: float

    def scaled(self, theirs: float, ours: float) -> Turns:
        """With the seconds of each side times a factor."""
        return Turns(self.theirs * theirs, self.ours * ours, self.ratio * theirs / ours)


def in_turns(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> Turns:
    """Both sides, warmed up once and then called in turns."""
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        theirs()
        between = time.perf_counter()
        ours()
        seconds.append((between - started, time.perf_counter() - between))
    slow, fast = zip(*seconds[1:], strict=True)
    return Turns(statistics.median(slow), statistics.median(fast), statistics.median(one / other for one, other in seconds[1:]))


def evaluation(case: Case, rounds: int, users: int) -> list[tuple[str, Turns, float | None]]:
    """Rows of one view's evaluation and of a validation of three views, scaled from some users to all where fewer are asked for."""
    dataset, trainer = case.dataset, case.ours
    case.model.load_state_dict(trainer.backbone.state_dict())
    n = len(dataset.test.users)
    scale = n / min(n, users)
    views = [("joint", dataset.modalities)] + [(m, (m,)) for m in dataset.modalities]

    def one(present: Sequence[str]) -> float:
        with torch.no_grad():
            return naive.recall(naive.tables(case.model, present, case.adjacency), dataset.train, dataset.test, limit=users)

    rows = []
    for name, theirs, ours in (
        ("evaluation, joint", lambda: one(dataset.modalities), lambda: trainer.rank(dataset.test)),
        ("evaluation, all views", lambda: [one(present) for _, present in views], lambda: trainer.diagnose(dataset.test)),
    ):
        turns = in_turns(theirs, ours, rounds)
        difference = abs(one(dataset.modalities) - trainer.rank(dataset.test).compute()["recall@20"]) if scale == 1 else None
        rows.append((name, turns.scaled(scale, 1), difference))
    return rows


def cells(slow: float, fast: float) -> str:
    """Two times in seconds as cells of the table, whose unit is the millisecond; in minutes where both are long."""
    return f"{slow / 60:.1f} min | {fast / 60:.1f} min" if fast >= 60 else f"{1000 * slow:.1f} | {1000 * fast:.1f}"


def estimated(case: Case, seconds: dict[str, Turns], epochs: int) -> list[tuple[str, Turns]]:
    """Rows of a distillation epoch and of the whole recipe, from the seconds of both sides for each step and evaluation."""
    steps = case.ours.stream.steps_per_epoch
    validations = epochs // case.config.training.validate_every
    whole = [0.0, 0.0]
    for name, turns in seconds.items():
        if name.startswith("evaluation"):  # a teacher has one view to validate, each of the two students has all
            times = validations * (len(case.dataset.modalities) if name == "evaluation, joint" else 2)
        else:
            times = epochs * steps
        whole = [total + times * one for total, one in zip(whole, turns, strict=False)]
    distilled = seconds["distilled step"]
    return [
        (f"distilled epoch of {steps} steps, estimated", distilled.scaled(steps, steps)),
        (f"whole recipe of {epochs} epochs each, estimated", Turns(whole[0], whole[1], whole[0] / whole[1])),
    ]


def triples_per_second(trainer: Trainer, steps: int) -> float:
    started = time.perf_counter()
    drawn = [trainer.stream.step(1, step) for step in range(steps)]
    return sum(t.ranking.shape[1] + t.distillation.shape[1] for t in drawn) / (time.perf_counter() - started)


def catalogue_products(case: Case) -> float:
    """Seconds of the two dense products of a step over the whole catalogue (projection, and its gradient)."""
    total, width = 0.0, case.model.item_embedding.shape[1]
    for m in case.dataset.modalities:
        features = case.model.get_buffer(f"features_{m}")
        weight, gradient = torch.randn(width, features.shape[1]), torch.randn(len(features), width)
        products = in_turns(lambda f=features, w=weight: f @ w.T, lambda f=features, g=gradient: g.T @ f, 5)  # type: ignore[misc]
        total += products.theirs + products.ours
    return total


def peak_memory(arguments: argparse.Namespace, case: Case, side: str) -> float:
    """Peak resident MB of a process that does three steps of one side, and of ours an evaluation."""
    command = [sys.executable, __file__, "--child", case.backbone, case.role, case.modality, side]
    command += ["--threads", str(arguments.threads), "--dataset", arguments.dataset, "--features", arguments.features]
    if arguments.data:
        command += ["--data", str(arguments.data)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(case: Case, side: str) -> None:
    case.build(side)
    (case.train_ours if side == "ours" else case.train_naive)(3)
    if side == "ours":
        case.ours.diagnose(case.dataset.val)
    print(peak_mb())


def profile(case: Case, steps: int) -> None:
    with torch.profiler.profile() as profiler:
        case.train_ours(steps)
    print(f"\n{case.name}, {steps} steps:\n")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the dataset's folder; without it, data of Baby's sizes are made up")
    parser.add_argument("--dataset", default="tiktok")
    parser.add_argument("--backbones", nargs="+", default=["vbpr", "mmgcn"], choices=["vbpr", "mmgcn"])
    parser.add_argument("--features", default="float32", choices=list(SAME), help="training.feature-dtype of our side")
    parser.add_argument("--roles", nargs="+", default=list(ROLES), choices=ROLES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100, help="of each model in the whole recipe")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--profile", action="store_true", help="print where our distillation steps spend their time")
    parser.add_argument("--quick", action="store_true", help="small data, two rounds: does it run?")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds = 2, 2
    torch.set_num_threads(arguments.threads)
    base: dict[str, object] = {"training.threads": arguments.threads, "distillation.rho": 1.0, "distillation.margin-dtype": "float32"}
    base["training.feature-dtype"] = arguments.features
    if arguments.data:
        base.update({"dataset": arguments.dataset, "data.dir": str((arguments.data / arguments.dataset).resolve())})
    config = resolve(base, {})  # type: ignore[arg-type]
    sizes = (2_000, 700, 12_000, {"image": 128, "text": 64}) if arguments.quick else BABY
    dataset = open_dataset(config) if arguments.data else made_up(*sizes)
    if arguments.child:
        backbone, role, modality, side = arguments.child
        child(Case("", config, dataset, backbone, role, modality), side)
        return
    print(f"{dataset.describe()}\n{platform.processor() or platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}\n")
    print("| case | published manner, ms | ours, ms | ratio | relative difference of the losses | peak memory, MB: published manner / ours |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []

    def show(name: str, turns: Turns, difference: float | None = None, memory: str = "") -> None:
        slow, fast, ratio = turns
        rows.append({"case": name, "published_ms": 1000 * slow, "ours_ms": 1000 * fast, "ratio": ratio, "difference": difference, "memory": memory})
        same = "" if difference is None else f"{difference:.1e}"
        print(f"| {name} | {cells(slow, fast)} | {ratio:.1f} | {same} | {memory} |", flush=True)

    notes = []
    for backbone in arguments.backbones:
        seconds: dict[str, Turns] = {}
        roles = [(role, modality) for role in arguments.roles for modality in (dataset.modalities if role == "teacher" else [""])]
        for role, modality in roles:
            name = f"{modality} {role} step".lstrip()
            case = Case(f"{backbone} {name}", config, dataset, backbone, role, modality)
            case.build()
            difference = case.difference()
            if not difference < SAME[arguments.features]:
                raise SystemExit(f"{case.name}: the losses differ by {difference:.1e}; the two sides do not compute the same")
            turns = in_turns(lambda c=case: c.train_naive(arguments.steps), lambda c=case: c.train_ours(arguments.steps), arguments.rounds)  # type: ignore[misc]
            seconds[name] = turns.scaled(1 / arguments.steps, 1 / arguments.steps)
            memory = " / ".join(f"{peak_memory(arguments, case, side):.0f}" for side in ("naive", "ours")) if arguments.memory else ""
            show(case.name, seconds[name], difference, memory)
            if role == "distilled":
                for row in evaluation(case, min(2, arguments.rounds), 2_000):
                    seconds[row[0]] = row[1]
                    show(f"{backbone} {row[0]}", *row[1:])
                if set(arguments.roles) == set(ROLES):
                    for whole in estimated(case, seconds, arguments.epochs):
                        show(f"{backbone} {whole[0]}", *whole[1:])
                if backbone == "vbpr":
                    notes.append(f"Two dense products over the whole catalogue: {1000 * catalogue_products(case):.1f} ms.")
                    notes.append(f"Triple stream: {triples_per_second(case.ours, 200) / 1e6:.1f} million triples a second.")
                if arguments.profile:
                    profile(case, arguments.steps)
            del case
    print("\n" + "\n".join(notes))
    print("Evaluations in the published manner are measured on 2,000 users and scaled to all.")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
