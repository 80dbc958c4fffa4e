"""What a person sees: one line per event, fit for a log, and a final table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ckd_fed.evaluation.metrics import cutoffs
from ckd_fed.tracking.result import OTHER_RANKINGS, RunResult

Values = Mapping[str, float]
WIDTH = 118
_UNBOUNDED = 10_000


def write(line: str) -> None:
    """Print at once: under Flower stdout is a pipe."""
    print(line, flush=True)


def no_counterfactual_notice(backbone: str) -> str:
    """What to say before a run of a backbone for which the counterfactual diagnosis is empty."""
    return (
        f"NOTE: the scores of {backbone} do not depend on features (they enter its losses only). All views rank alike and every causal effect "
        "is 0 by construction, so all teachers weigh 1, and no effects, weights or views of single modalities are reported."
    )


def size(n_bytes: float) -> str:
    """Bytes for people: ``1.4 MB``."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def pretraining_line(number: int, reports: Mapping[str, Sequence[Values]], seconds: float, n_bytes: int) -> str:
    """Round of phase 1: each teacher's epoch and validation Recall@20."""
    parts = []
    for name, rows in reports.items():
        if not rows:
            continue
        last = rows[-1]
        best = max(row["val/recall@20"] for row in rows)
        state = f"epoch {last['epoch']:.0f} loss {last['loss/total']:.4f} val R@20 {last['val/recall@20']:.4f} (round's best {best:.4f})"
        parts.append(f"{name.removeprefix('teacher/')}: {state}{' converged' if last.get('done') else ''}")
    return f"round {number:>3} teachers   {' | '.join(parts)} | {seconds:.1f} s{_traffic(n_bytes)}"


def distillation_line(number: int, values: Values, modalities: Sequence[str]) -> str:
    """Round of phase 2: losses, validation, and per modality effect, weight and recall against its teacher."""
    parts = [
        f"round {number:>3} distilling epoch {values['epoch']:.0f} loss {values['loss/total']:.4f} (bpr {values.get('loss/bpr', 0.0):.4f}"
        + (f" kd {values['loss/kd']:.4f})" if "loss/kd" in values else ")")
        + f" val R@20 {values['val/recall@20']:.4f}{' *' if values.get('gain') else '  '}"
    ]
    for m in modalities:
        if f"only/{m}/recall@20" not in values:  # the backbone's scores do not depend on features
            continue
        text = m
        if f"effect/{m}" in values:
            text += f": effect {values[f'effect/{m}']:.2f} weight {values[f'weight/{m}']:.2f}"
        text += f" only {values[f'only/{m}/recall@20']:.4f}"
        if f"teacher/{m}/recall@20" in values:
            text += f"/{values[f'teacher/{m}/recall@20']:.4f} ({values[f'reached/{m}']:.0%})"
        parts.append(text)
    return " | ".join([*parts, f"{values['seconds']:.1f} s{_traffic(values.get('bytes', 0))}"])


def final_table(result: RunResult) -> str:
    """Test metrics of every model, and how much of each teacher the student has reached."""
    ks = cutoffs(name for outcome in result.outcomes.values() for name in outcome.test)  # those asked for
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in ks]
    table = Table(title="test set, all items ranked (NDCG: standard)", title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("best epoch", justify="right")
    for name in columns:
        table.add_column(name.replace("recall", "Recall").replace("ndcg", "NDCG"), justify="right", no_wrap=True)
    diagnosed = [m for m in result.modalities if any(f"only/{m}/recall@20" in outcome.test for outcome in result.outcomes.values())]
    for m in diagnosed:
        table.add_column(f"reached {m}", justify="right")
    for name, outcome in result.outcomes.items():
        reached = result.reached(name)
        label = {"plain": "plain student", "student": "distilled student"}.get(name, f"teacher {name.removeprefix('teacher/')}")
        if name == "student" and not any(key.startswith("teacher/") for key in result.outcomes):
            label = "student (no distillation)"
        cells = _cells(outcome.test, columns)
        table.add_row(label, str(outcome.best_epoch), *cells, *(f"{reached[m]:.0%}" if m in reached else "" for m in diagnosed))
        views = {f"only/{m}/": f"its {m} view" for m in result.modalities} | OTHER_RANKINGS
        best = outcome.best_view().replace(" ", "/") + "/"
        for prefix, label in views.items():
            if f"{prefix}recall@20" in outcome.test:
                cells = _cells(outcome.test, columns, prefix)
                table.add_row(f"  {label}{' *' if prefix == best else ''}", "", *cells, *("" for _ in diagnosed))
    out = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    needed = Measurement.get(out, out.options.update_width(_UNBOUNDED), table)
    if needed.minimum > WIDTH:  # many cut-offs: better long lines than numbers cut
        out.width = needed.maximum
    out.print(table)
    if diagnosed:
        out.print("reached m: Recall@20 of the student's own m view over that of teacher m (100 % = all that the modality can do).", highlight=False)
    for name, outcome in result.outcomes.items():
        if outcome.readout:
            weights = {key.removeprefix("readout/weight/"): value for key, value in outcome.readout.items() if key.startswith("readout/weight/")}
            fitted = ", ".join(f"{view} {weight:+.2f}" for view, weight in weights.items())
            out.print(f"{name} calibrated: {fitted} (fitted on validation, where {outcome.best_view()} is the best view, *).", highlight=False)
    text = out.file
    assert isinstance(text, io.StringIO)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cells(test: Values, metrics: Sequence[str], prefix: str = "") -> list[str]:
    return [f"{test[prefix + metric]:.4f}" if prefix + metric in test else "" for metric in metrics]


def _traffic(n_bytes: float) -> str:
    return f", {size(n_bytes)}" if n_bytes else ""
