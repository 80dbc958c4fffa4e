"""The figures of a report, each drawn from a run's history; None where the run has nothing to show for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from ckd_fed.analysis.history import RunHistory, series
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.report.diagnosis import Diagnosis, diagnose
from ckd_fed.report.style import BARS, WIDTH, figure, legend_below, line, reference, whole_numbers
from ckd_fed.tracking.console import size


@dataclass(frozen=True)
class Drawing:
    """A figure with what is said about it.

    Attributes:
        name: of its file.
        title: a heading in plain words.
        caption: how to read it.
        figure: the figure itself.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def diagnosis(history: RunHistory) -> Drawing | None:
    """Bars: for each modality, alone, inside the plain student, and inside the distilled student."""
    found = diagnose(history)
    if found is None:
        return None
    groups = [*found.views, "all together"] if found.joint else list(found.views)
    height = 0.21
    rows = sum(len(found.bars(name)) for name in groups)
    made, (axes,) = figure(1.35 + 0.27 * rows + 0.12 * len(groups))
    largest = max(max(found.bars(name).values()) for name in groups)
    y, ticks, drawn = 0.0, [], set()
    for name in groups:
        first, bars = y, found.bars(name)
        for source, value in bars.items():
            axes.barh(y, value, height, label=None if source in drawn else source, **BARS[source])
            drawn.add(source)
            reached = found.reached(name, source)
            text = f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"
            axes.text(value + 0.012 * largest, y, text + (f"  ({reached:.0%})" if reached is not None else ""), va="center", fontsize=9)
            y += height + 0.03
        ticks.append((first + y - height - 0.03) / 2)
        y += 0.16
    axes.set_yticks(ticks, groups)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.set_xlim(0, largest * 1.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.set_xlabel(f"Recall@20 on {found.where}")
    legend_below(made, axes, columns=1)
    caption = (
        "For each modality: how well items are ranked by it alone (its teacher), and by its part of each student. "
        "In brackets: the share of the teacher's recall that the student has learnt; far under 100 % the modality is starved."
        if found.has_teachers
        else "How well items are ranked by each modality's part of the student. Without teachers there is nothing to hold it against."
    )
    return Drawing("diagnosis", "What each modality can do, and what the student has learnt of it", caption, made)


def imbalance(history: RunHistory) -> Drawing | None:
    """Lines: the share of its teacher's recall that each modality's view of the student has reached, over epochs."""
    curves = {m: series(history.distillation, "epoch", f"reached/{m}") for m in history.modalities}
    curves = {m: curve for m, curve in curves.items() if curve[0]}
    if not curves:
        return None
    made, (axes,) = figure(3.1)
    for index, (m, (x, y)) in enumerate(curves.items()):
        line(axes, index, x, y, f"{m}, distilled")
    reference(axes, 1.0, "all that the teacher can do")
    for index, m in enumerate(curves):
        plain = Diagnosis.plain_reached(history, m)
        if plain is not None:
            x_end = max(max(x) for x, _ in curves.values())
            axes.plot([x_end], [plain], marker="x*+1"[index % 4], color="black", markersize=8, linestyle="none", label=f"{m}, plain at its best")
    axes.set_ylim(0, max(1.1, *(1.08 * max(y) for _, y in curves.values())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("epoch of the student")
    axes.set_ylabel("share of its teacher")
    whole_numbers(axes)
    legend_below(made, axes)
    caption = "Each modality's part of the student against its teacher, on validation. Lines far apart, or far under 100 %, are the imbalance."
    return Drawing("imbalance", "How far the student is with each modality", caption, made)


def effects(history: RunHistory) -> Drawing | None:
    """Lines in two panels: mean causal effect and mean weight of each modality over rounds."""
    panels = {"effect": "mean causal effect", "weight": "mean weight"}
    curves = {(kind, m): series(history.distillation, "round", f"{kind}/{m}") for kind in panels for m in history.modalities}
    curves = {key: curve for key, curve in curves.items() if curve[0]}
    if not curves:
        return None
    made, axes = figure(4.4, 2)
    for index, m in enumerate(history.modalities):
        for panel, kind in zip(axes, panels, strict=True):
            if (kind, m) in curves:
                line(panel, index, *curves[kind, m], m)
    reference(axes[1], 1.0, "weight 1: all teachers alike")
    for panel, label in zip(axes, panels.values(), strict=True):
        panel.set_ylabel(label)
        _at_least_a_span(panel, 0.1)
    axes[1].set_xlabel("round")
    whole_numbers(axes[1])
    legend_below(made, axes[1], columns=3)
    caption = (
        "Above: what a modality contributes to the student's judgement, as its counterfactual effect (0: nothing). "
        "Below: how strongly its teacher is listened to; the weaker a modality's effect, the larger the weight."
    )
    return Drawing("effects", "What each modality contributes, and how its teacher is weighted", caption, made)


def learning(history: RunHistory) -> Drawing | None:
    """Lines in two panels: validation recall of every model, and the student's losses, over epochs."""
    curves = {_label(name, history): series(rows, "epoch", f"val/{METRIC}") for name, rows in history.learners.items()}
    curves[_label("student", history)] = series(history.distillation, "epoch", f"val/{METRIC}")
    curves = {label: curve for label, curve in curves.items() if curve[0]}
    if not curves:
        return None
    losses = {name: series(history.distillation, "epoch", f"loss/{name}") for name in ("bpr", "kd")}
    losses = {name: curve for name, curve in losses.items() if curve[0]}
    made, axes = figure(4.6 if losses else 3.2, 2 if losses else 1)
    student = _label("student", history)
    for index, (label, (x, y)) in enumerate(sorted(curves.items(), key=lambda item: item[0] != student)):
        line(axes[0], index, x, y, label)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("Recall@20, validation")
    if losses:
        names = {"bpr": "recommendation (BPR)", "kd": "distillation (weighted)"}
        for (name, (x, y)), colour, dashes in zip(losses.items(), ("black", "#777777"), ("-", "--"), strict=False):
            axes[1].plot(x, y, color=colour, linestyle=dashes, marker=".", linewidth=1.5, label=names[name])
        values = [value for _, y in losses.values() for value in y]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes[1].set_yscale("log")
            axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes[1].set_ylim(bottom=0)
        axes[1].set_ylabel("student's loss")
        axes[1].legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    axes[-1].set_xlabel("epoch")
    whole_numbers(axes[-1])
    legend_below(made, axes[0])
    caption = "Every model on validation."
    if losses:
        caption += " Below, the student's loss: what it pays for wrong rankings, and for knowing less than its teachers."
    return Drawing("learning", "How the models learnt", caption, made)


def time_taken(history: RunHistory) -> Drawing | None:
    """Bars of the seconds of every participant in all, and lines of the seconds by round."""
    taken = history.seconds_by_participant()
    if not taken:
        return None
    made = Figure(figsize=(WIDTH, 2.7 + 0.24 * len(taken)), layout="constrained")
    above, below = made.subplots(2, 1, height_ratios=[0.35 + 0.26 * len(taken), 1.7])
    totals = {name: sum(rounds.values()) for name, rounds in taken.items()}
    bars = above.barh(list(totals), list(totals.values()), 0.6, facecolor="#bbbbbb", edgecolor="black", hatch="//")
    above.bar_label(bars, [f" {total:,.1f} s" for total in totals.values()], fontsize=9)
    above.invert_yaxis()
    above.grid(visible=False, axis="y")
    above.set_xlim(0, max(totals.values(), default=0) * 1.2 or 1)
    above.set_xlabel("seconds in all")
    for index, (name, rounds) in enumerate(taken.items()):
        line(below, index, sorted(rounds), [rounds[number] for number in sorted(rounds)], name)
    if history.teacher_rounds and history.distillation:
        below.axvline(history.distillation[0]["round"] - 0.5, color="black", linewidth=0.8)
    values = [seconds for rounds in taken.values() for seconds in rounds.values() if seconds > 0]
    if values and max(values) > 30 * min(values):
        below.set_yscale("log")
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        below.set_ylim(0, 1.1 * max(values, default=1.0))
    below.set_xlabel("round")
    below.set_ylabel("seconds")
    whole_numbers(below)
    legend_below(made, below)
    caption = "Above: seconds in all. Below: by round" + ("; the teachers' rounds are left of the upright line." if history.teacher_rounds else ".")
    return Drawing("time", "Who was slow", caption, made)


def traffic(history: RunHistory) -> Drawing | None:
    """Bars: bytes of every round, the teachers' margins apart from the rest."""
    rows = [row for row in [*history.teacher_rounds, *history.distillation] if row.get("bytes")]
    if not rows:
        return None
    made, (axes,) = figure(2.7)
    numbers = [row["round"] for row in rows]
    margins = [float(row.get("bytes/margins") or 0) / 1e6 for row in rows]
    other = [float(row["bytes"]) / 1e6 - margin for row, margin in zip(rows, margins, strict=True)]
    axes.bar(numbers, margins, 0.8, facecolor="white", edgecolor="black", hatch="////", label="the teachers' margins")
    axes.bar(numbers, other, 0.8, bottom=margins, facecolor="#777777", edgecolor="black", label="the student's parameters, and margins passed on")
    axes.set_xlabel("round")
    axes.set_ylabel("MB sent and received")
    whole_numbers(axes)
    legend_below(made, axes, columns=1)
    return Drawing("traffic", "What travelled", f"{size(history.bytes)} in all. Features and interactions never travel.", made)


FIGURES: tuple[Callable[[RunHistory], Drawing | None], ...] = (diagnosis, imbalance, effects, learning, time_taken, traffic)


def _label(model: str, history: RunHistory) -> str:
    student = "distilled student" if history.distilled else "student"
    return {"student": student, "plain": "plain student"}.get(model, f"teacher {model.removeprefix('teacher/')}")


def _at_least_a_span(axes: object, span: float) -> None:
    """Keep an axis from blowing up differences that mean nothing."""
    low, high = axes.get_ylim()  # type: ignore[attr-defined]
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)  # type: ignore[attr-defined]
