"""What distillation gives each backbone: teachers, plain and distilled students on real data, resumable model by model.

    python benchmarks/quality.py run --data DIR --dataset tiktok --backbone vbpr --seeds 123 2024 7
    python benchmarks/quality.py table                     # from all that is there; what was not run stands there as not run

``run`` trains each model to early stopping with the published hyper-parameters and appends one line to ``--results`` (JSON lines) for
each. A model that is in that file is not trained again, and one that was cut off goes on from its last validation, so an interrupted call
goes on where it stopped; files from several machines can be concatenated. DIR holds the dataset's folder. Teachers' tables are kept in
``--cache`` for the students that need them, unfinished models, and every model's test metrics by user, from which the call ends by testing
distilled against plain over users (paired t-test).

Plain and distilled students get the same budget: ``--trials`` settings each (plain: learning rates, distilled: rho), tried on the
first seed and chosen on validation; the other seeds run with the chosen one. ``--all`` runs every setting with every seed. The tables and
tests choose on the seed with which most settings were tried, the smallest of several, whatever the order of the lines.

``--one-start`` gives all roles the initial parameters that the seed alone decides, as in the published code, where each process draws
them from the same seed; by default every role has its own. Such models are listed apart and never chosen.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckd_fed.analysis.compare import paired
from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.base import Embeddings
from ckd_fed.checkpoint import load_checkpoint, save_checkpoint
from ckd_fed.config import Config, resolve
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.locate import open_dataset
from ckd_fed.data.triples import StepTriples
from ckd_fed.distillation.margins import DTYPES, margin_sheet
from ckd_fed.evaluation.calibration import calibration_views, combine, view_name
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.evaluation.per_user import rank_users
from ckd_fed.training.build import build_fit, build_trainer
from ckd_fed.training.fit import Fit, Sheets
from ckd_fed.training.fit_state import fit_state, restore_fit
from ckd_fed.training.means import Values
from ckd_fed.training.trainer import Trainer

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "docs" / "results.jsonl"
STATE = "state.safetensors"  # the kind of file that holds an unfinished model
ONE_START = " (one start)"
KINDS = ("teachers", "distilled", "plain")
RATES, RHOS = (1.0, 0.5, 2.0), (1.0, 0.1, 10.0)  # in the order of trial; rates are multiples of the backbone's published learning rate

# Test Recall@20 that the authors' implementation is said to give on these files, by seed (as far as it was run).
PUBLISHED: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("tiktok", "vbpr"): {
        "plain": (0.0507, 0.0489, 0.0506),
        "teacher/image": (0.0413, 0.0468),
        "teacher/audio": (0.0352, 0.0380, 0.0357),
        "distilled rho=0.01": (0.0496, 0.0499),
        "distilled rho=0.1": (0.0511, 0.0501),
        "distilled rho=1": (0.0537, 0.0530),
        "distilled rho=10": (0.0543, 0.0545),
    },
    ("baby", "vbpr"): {
        "plain": (0.0514,),
        "teacher/text": (0.0507,),
        "teacher/image": (0.0345,),
        "distilled rho=0.01": (0.0568,),
        "distilled rho=0.1": (0.0628,),
        "distilled rho=1": (0.0639,),
    },
}


class Results:
    """The file of results: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def find(self, **key: object) -> list[Row]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Study:
    """One dataset, backbone and seed: trains whichever models are asked for and not there yet."""

    def __init__(self, config: Config, dataset: Dataset, results: Results, cache: Path, *, one_start: bool = False) -> None:
        self.config, self.dataset, self.results, self.cache, self.one_start = config, dataset, results, cache, one_start
        self.key = {"dataset": config.dataset, "backbone": config.backbone, "seed": config.seed}

    def teachers(self) -> dict[str, Embeddings]:
        """Modality -> its teacher's tables; trained where they are not in the cache."""
        found = {}
        for m in self.dataset.modalities:
            model = self._named(f"teacher/{m}")
            path = cached(self.cache, self.key, model, "safetensors")
            if not path.is_file():
                tables = self._train(model, self.config, self.dataset.of_modalities((m,)), {})
                save_checkpoint(path, {"users": tables.users.cpu().numpy(), "items": tables.items.cpu().numpy()}, {})
            arrays, _ = load_checkpoint(path)
            found[m] = Embeddings(torch.from_numpy(arrays["users"]), torch.from_numpy(arrays["items"]))
        return found

    def plain(self, rate: float) -> Row:
        """The plain student with a multiple of the published learning rate."""
        model = self._named("plain" if rate == 1 else f"plain rate x{rate:g}")
        if not self.results.find(**self.key, model=model):
            config = resolve(self.config.flat(), {"training.learning-rate": rate * self.config.training.learning_rate})
            self._train(model, config, self.dataset, {})
        return self.results.find(**self.key, model=model)[0]

    def distilled(self, rho: float) -> Row:
        """The student distilled with a weight rho."""
        model = self._named(f"distilled rho={rho:g}")
        if not self.results.find(**self.key, model=model):
            self._train(model, resolve(self.config.flat(), {"distillation.rho": rho}), self.dataset, self.teachers())
        return self.results.find(**self.key, model=model)[0]

    def _named(self, model: str) -> str:
        return model + ONE_START if self.one_start else model

    def _train(self, model: str, config: Config, dataset: Dataset, teachers: Mapping[str, Embeddings]) -> Embeddings:
        role = "any" if self.one_start else model if model.startswith("teacher/") else "student" if teachers else "plain"
        fit = build_fit(config, build_trainer(config, dataset, role, distilled=bool(teachers)))
        dtype = DTYPES[config.distillation.margin_dtype]

        def sheets(steps: Sequence[StepTriples]) -> dict[str, np.ndarray]:
            return {m: margin_sheet(embeddings, steps, dtype) for m, embeddings in teachers.items()}

        at_best, spent = self._advance(model, fit, sheets if teachers else None)
        fit.trainer.restore(fit.best)
        student, started = len(dataset.modalities) > 1, time.monotonic()
        metrics, chosen = fit.trainer.read_out(dataset.test) if student else (fit.trainer.diagnose(dataset.test), {})
        row = {**self.key, "model": model, "best_epoch": fit.stopping.best_epoch, "epochs": fit.epoch, "val": fit.stopping.best}
        row.update(seconds=round(spent + time.monotonic() - started), device=config.training.device, torch=torch.__version__)
        row.update(test={name: round(value, 6) for name, value in metrics.compute().items() if not name.startswith("precision")})
        row.update(readout={name: round(value, 6) for name, value in chosen.items()})
        row.update({name: round(value, 4) for name, value in at_best.items() if name.startswith(("weight/", "effect/"))})
        self._keep_users(model, fit.trainer, chosen)
        if not self.results.find(**self.key, model=model):  # a teacher trained again for its tables alone
            self.results.add(row)
        print(f"{' '.join(map(str, self.key.values()))} {model}: best epoch {row['best_epoch']}, ", end="")
        print(f"test Recall@20 {metrics.compute()['recall@20']:.4f}, {row['seconds']} s", flush=True)
        cached(self.cache, self.key, model, STATE).unlink(missing_ok=True)
        return fit.trainer.joint_tables()

    def _advance(self, model: str, fit: Fit, sheets: Callable[[Sequence[StepTriples]], Sheets] | None) -> tuple[Values, float]:
        """Train to the end, from the last validation of a call that was cut off; returns the best epoch's row and the seconds of all calls."""
        path, started = cached(self.cache, self.key, model, STATE), time.monotonic()
        kept: dict[str, Any] = {"at_best": {}, "seconds": 0.0}
        if path.is_file():
            arrays, kept = load_checkpoint(path)
            restore_fit(fit, arrays, kept["fit"])
        before = float(kept["seconds"])

        def keep(row: Values) -> None:
            kept["seconds"] = before + time.monotonic() - started
            if row["gain"]:
                kept["at_best"] = row
            arrays, kept["fit"] = fit_state(fit)
            save_checkpoint(path, arrays, kept)
            line = f"epoch {fit.epoch}, val/{METRIC} {row[f'val/{METRIC}']:.4f}, best {fit.stopping.best:.4f} at {fit.stopping.best_epoch}"
            print(f"{self.key['backbone']} {model}: {line}, {kept['seconds']:.0f} s", file=sys.stderr, flush=True)

        fit.advance(sheets=sheets, on_validation=keep)
        return kept["at_best"], before + time.monotonic() - started

    def _keep_users(self, model: str, trainer: Trainer, chosen: Mapping[str, float]) -> None:
        """Write every test user's metric, of the joint ranking and of a student's calibrated one."""
        ranked = {"joint": trainer.joint_tables()}
        if chosen:
            tables = trainer.embeddings(calibration_views(trainer.backbone))
            weights = {view: chosen.get(f"readout/weight/{view_name(trainer.backbone, view)}", 0.0) for view in tables}
            ranked["calibrated"] = combine(tables, {view: weight for view, weight in weights.items() if weight})
        k = max(trainer.ks)
        users = {name: rank_users(table, self.dataset.train, self.dataset.test, k).metrics(trainer.ks)[METRIC] for name, table in ranked.items()}
        path = cached(self.cache, self.key, model, "npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **users)


def cached(cache: Path, key: Mapping[str, object], model: str, kind: str) -> Path:
    """Where a model's tables or its users' metrics are kept."""
    name = "-".join(map(str, [*key.values(), model]))
    return cache / f"{re.sub('[^a-zA-Z0-9_.=]+', '-', name)}.{kind}"


def test_over_users(results: Results, cache: Path, dataset: str, backbone: str) -> None:
    """Append the paired tests of the chosen distilled student: each user's metric, averaged over the seeds at hand, against another's.

    The test takes users as the sample: it says whether these students differ on other users, not what another seed would give (which the
    deviation over seeds says). Of a comparison made several times, ``table`` shows the last.
    """
    rows = [row for row in results.find(dataset=dataset, backbone=backbone) if not row["model"].endswith(ONE_START)]
    plain, distilled = chosen_rows(rows, "plain"), chosen_rows(rows, "distilled")
    teachers = [row for row in rows if row["model"].startswith("teacher/")]
    if not distilled:
        return
    student = distilled[0]["model"]
    best_teacher = max(teachers, key=lambda row: float(row["val"]))["model"] if teachers else None
    others = [(plain[0]["model"], "joint")] if plain else []
    others += [(best_teacher, "joint")] if best_teacher else []
    for of, (model, ranking) in [("joint", other) for other in others] + [("calibrated", other) for other in [*others, (student, "joint")]]:
        sides: list[tuple[np.ndarray, np.ndarray]] = []
        seeds = []
        for row in distilled:
            key = {"dataset": dataset, "backbone": backbone, "seed": row["seed"]}
            paths = [cached(cache, key, name, "npz") for name in (student, model)]
            if all(path.is_file() for path in paths):
                with np.load(paths[0]) as ours, np.load(paths[1]) as theirs:
                    if of in ours:
                        sides.append((ours[of], theirs[ranking]))
                        seeds.append(row["seed"])
        if not seeds:
            continue
        by_user = np.asarray(sides, dtype=np.float64).mean(axis=0)  # (2, users)
        difference, low, high, p = paired(by_user[0], by_user[1])
        row = {"dataset": dataset, "backbone": backbone, "model": "paired", "of": f"{student}, {of}", "against": f"{model}, {ranking}"}
        known = not np.isnan(p)  # not with one user, and JSON has no NaN
        row.update(seeds=seeds, users=by_user.shape[1], difference=round(difference, 6))
        row.update(low=round(low, 6) if known else None, high=round(high, 6) if known else None, p=p if known else None)
        if row not in results.rows:
            results.add(row)


def run(arguments: argparse.Namespace) -> None:
    """Train what is not there yet."""
    results = Results(arguments.results)
    base = {"dataset": arguments.dataset, "backbone": arguments.backbone, "data.dir": str((arguments.data / arguments.dataset).resolve())}
    rates, rhos = RATES[: arguments.trials], tuple(arguments.rhos or RHOS[: arguments.trials])
    for seed in arguments.seeds:
        config = resolve(base, {"seed": seed, "training.threads": arguments.threads, "training.device": arguments.device})
        study = Study(config, open_dataset(config), results, arguments.cache, one_start=arguments.one_start)
        if "teachers" in arguments.only:
            study.teachers()
        distilled = {rho: study.distilled(rho)["val"] for rho in rhos} if "distilled" in arguments.only else {}
        plain = {rate: study.plain(rate)["val"] for rate in rates} if "plain" in arguments.only else {}
        if not arguments.all:  # chosen on validation with the first seed
            rates = (max(plain, key=plain.__getitem__),) if plain else rates
            rhos = (max(distilled, key=distilled.__getitem__),) if distilled else rhos
    test_over_users(results, arguments.cache, arguments.dataset, arguments.backbone)


def table(arguments: argparse.Namespace) -> None:
    """Print tables of all results as Markdown."""
    results = Results(arguments.results)
    for dataset in dict.fromkeys(row["dataset"] for row in results.rows):
        print(f"\n## {dataset}: test Recall@20, mean ± standard deviation over seeds\n")
        print("| backbone | teachers | plain | its best view | calibrated | distilled | its best view | calibrated | gain |")
        print("|---|---|---|---|---|---|---|---|---|")
        for backbone in sorted(BACKBONES):
            print(summary(results, dataset, backbone))
        for backbone in dict.fromkeys(row["backbone"] for row in results.rows if row["dataset"] == dataset):
            print(details(results, dataset, backbone))


def summary(results: Results, dataset: str, backbone: str) -> str:
    """One backbone's row: its chosen plain student against its chosen distilled one."""
    rows = [row for row in results.find(dataset=dataset, backbone=backbone) if not row["model"].endswith(ONE_START)]
    plain, distilled = chosen_rows(rows, "plain"), chosen_rows(rows, "distilled")
    if not rows:
        return f"| {backbone} | " + " | ".join(["not run"] * 7) + " | |"
    teachers = sorted({row["model"] for row in rows if row["model"].startswith("teacher/")})
    cells = [", ".join(f"{m.removeprefix('teacher/')} {spread([row['test']['recall@20'] for row in rows if row['model'] == m])}" for m in teachers)]
    for chosen in (plain, distilled):
        if not chosen:
            cells += ["not run"] * 3
            continue
        best = [found for row in chosen if (found := best_view(row))]
        cells.append(spread([row["test"]["recall@20"] for row in chosen]) + f" ({chosen[0]['model']})")
        cells.append(spread([value for _, value in best]) + f" ({', '.join(sorted({name for name, _ in best}))})" if best else "")
        cells.append(spread([row["test"]["calibrated/recall@20"] for row in chosen if "calibrated/recall@20" in row["test"]]))
    paired = [(a, b) for a in plain for b in distilled if a["seed"] == b["seed"]]
    gain = f"{np.mean([b['test']['recall@20'] / a['test']['recall@20'] - 1 for a, b in paired]):+.1%}" if paired else ""
    return f"| {backbone} | {' | '.join(cells)} | {gain} |"


def details(results: Results, dataset: str, backbone: str) -> str:
    """Every model of one backbone beside the published figures, and the paired tests."""
    rows, published = results.find(dataset=dataset, backbone=backbone), PUBLISHED.get((dataset, backbone), {})
    lines = [f"\n### {backbone} on {dataset}, every model\n", "| model | by seed | mean | published | ratio | best epochs | val | its views |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    pairs = {(row["of"], row["against"]): row for row in rows if row["model"] == "paired"}
    for model in dict.fromkeys(str(row["model"]) for row in rows if row["model"] != "paired"):
        chosen = [row for row in rows if row["model"] == model]
        recalls = [row["test"]["recall@20"] for row in chosen]
        by_seed = ", ".join(f"{row['seed']}: {recall:.4f}" for row, recall in zip(chosen, recalls, strict=True))
        known = published.get(model.removesuffix(ONE_START))
        theirs = float(np.mean(known)) if known else None
        against = f"{theirs:.4f} | {np.mean(recalls) / theirs:.2f}" if theirs else " | "
        epochs = " to ".join(str(epoch) for epoch in sorted({min(row["best_epoch"] for row in chosen), max(row["best_epoch"] for row in chosen)}))
        views = sorted({name for row in chosen for name in row["test"] if "/" in name and name.endswith("/recall@20")})
        shown = ", ".join(
            f"{name.removesuffix('/recall@20').replace('/', ' ')} {np.mean([row['test'][name] for row in chosen if name in row['test']]):.4f}"
            for name in views
        )
        val = np.mean([row["val"] for row in chosen])
        lines.append(f"| {model} | {by_seed} | {np.mean(recalls):.4f} | {against} | {epochs} | {val:.4f} | {shown} |")
    if pairs:
        lines += ["\nPaired over users, test Recall@20:\n", "| of | against | seeds | difference (95 %) | p |", "|---|---|---|---|---|"]
    for (of, against), row in pairs.items():
        seeds = ", ".join(map(str, row["seeds"]))
        interval, p = ("", "") if row["p"] is None else (f" ({row['low']:+.4f} to {row['high']:+.4f})", f"{row['p']:.1e}")
        lines.append(f"| {of} | {against} | {seeds} | {row['difference']:+.4f}{interval} | {p} |")
    return "\n".join(lines)


def chosen_rows(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of the setting of a kind (plain, distilled) that is best on validation with the seed with which most settings were tried.

    Of several such seeds it is the smallest, and of settings that are equally good the first by name: the order of the rows, which is
    chance where files were concatenated, decides nothing.
    """
    of_kind = [row for row in rows if row["model"].split()[0] == kind]
    if not of_kind:
        return []
    tried: dict[int, set[str]] = {}
    for row in of_kind:
        tried.setdefault(row["seed"], set()).add(row["model"])
    seed = min(tried, key=lambda seed: (-len(tried[seed]), seed))
    best = min((row for row in of_kind if row["seed"] == seed), key=lambda row: (-float(row["val"]), row["model"]))
    return [row for row in of_kind if row["model"] == best["model"]]


def best_view(row: Row) -> tuple[str, float] | None:
    """The view that is best on validation, and its test Recall@20; None where no views were read out."""
    recalls = {name.removeprefix("readout/val/"): value for name, value in row["readout"].items() if name.startswith("readout/val/")}
    recalls.pop("calibrated", None)
    if not recalls:
        return None
    name = max(recalls, key=lambda view: float(recalls[view]))
    return name, row["test"]["recall@20" if name == "joint" else f"{name.replace(' ', '/')}/recall@20"]


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    if not values:
        return ""
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="train what is not there yet")
    runner.add_argument("--data", type=Path, required=True, help="folder that holds the dataset's folder")
    runner.add_argument("--dataset", default="tiktok")
    runner.add_argument("--backbone", default="vbpr")
    runner.add_argument("--seeds", type=int, nargs="+", default=[123, 2024, 7])
    runner.add_argument("--trials", type=int, default=3, help="settings tried of plain and of distilled students, 1 to 3")
    runner.add_argument("--rhos", type=float, nargs="+", help="these instead of the trials' rhos")
    runner.add_argument("--all", action="store_true", help="every setting with every seed")
    runner.add_argument("--one-start", action="store_true", help="the same initial parameters for all roles, as published")
    runner.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="these models alone; distilled students need teachers anyway")
    runner.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for the default")
    runner.add_argument("--device", default="auto")
    runner.add_argument("--cache", type=Path, default=Path("quality-cache"), help="folder of teachers' tables, unfinished models and users' metrics")
    runner.set_defaults(action=run)
    printer = commands.add_parser("table", help="print tables of all results")
    printer.set_defaults(action=table)
    for command in (runner, printer):
        command.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.action(arguments)


if __name__ == "__main__":
    main()
