"""The report as one HTML page: no script, no font, nothing fetched; for a screen, a phone and black-and-white print."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

from matplotlib import rc_context

from ckd_fed.analysis.history import RunHistory
from ckd_fed.evaluation.metrics import METRIC, cutoffs
from ckd_fed.report.figures import Drawing
from ckd_fed.report.words import Words
from ckd_fed.tracking.result import OTHER_RANKINGS

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 72rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; line-height: 1.3; }
.verdict { border: 2px solid #111; border-left-width: .6rem; padding: .7rem 1rem; font-size: 1.1rem; margin: .8rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.6rem 2rem; margin: 1.4rem 0;
  align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; max-width: 36rem; height: auto; display: block; }
figcaption { font-size: .9rem; color: #333; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; font-size: .95rem; }
caption { text-align: left; font-size: .9rem; color: #333; padding-bottom: .3rem; }
th, td { border-bottom: 1px solid #bbb; padding: .3rem .5rem; text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid #111; }
th:first-child, td:first-child { text-align: left; }
tr.view td:first-child { padding-left: 1.6rem; }
details { margin: 1rem 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .1rem 1.5rem; font-size: .85rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px dotted #bbb; }
dt { color: #333; } dd { margin: 0; text-align: right; }
@media (max-width: 40rem) {
  body { padding: .7rem; }
  table, caption, tbody, tr, td { display: block; }
  thead { display: none; }
  tr { border-bottom: 1px solid #111; padding: .4rem 0; }
  td { border: 0; padding: .05rem 0; display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-label); color: #333; text-align: left; }
  td:first-child { font-weight: 600; } td:first-child::before { content: none; }
  tr.view td:first-child { padding-left: 0; }
  td:empty { display: none; }
}
@media print { body { max-width: none; padding: 0; font-size: 11pt; } details { display: none; } .figures { grid-template-columns: 1fr 1fr; } }
"""


_LABELS = {"recall": "Recall", "ndcg": "NDCG", "precision": "Precision", "hit_rate": "Hit rate"}


def page(history: RunHistory, words: Words, drawings: Sequence[Drawing]) -> str:
    """The whole page."""
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in words.imbalance)
    course = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in words.course)
    title = f"Run {history.name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="verdict">{html.escape(words.verdict)}</p>',
        f"<ul>{said}</ul>" if said else "",
        '<div class="figures">' + "".join(_figure(drawing) for drawing in drawings) + "</div>" if drawings else "<p>No round was recorded.</p>",
        f"<h2>How the run went</h2>{course}",
        final_table(history),
        group_tables(history),
        _configuration(history),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
    body = "\n".join(filter(None, parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'


def table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table that folds into one card a row on a phone; ``rows`` are (class of the row, cells)."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = ""
    for kind, cells in rows:
        filled = "".join(f'<td data-label="{html.escape(column)}">{html.escape(cell)}</td>' for column, cell in zip(columns, cells, strict=True))
        body += f'<tr class="{kind}">{filled}</tr>' if kind else f"<tr>{filled}</tr>"
    return f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def final_table(history: RunHistory) -> str:
    """Test metrics of every model and of each modality's view of the students; empty where nothing was tested."""
    if not history.models:
        return ""
    ks = cutoffs(history.tested(history.models[-1]))
    metrics = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in ks] + ["precision@20", "hit_rate@20"]
    labels = [f"{_LABELS[kind]}@{k}" for kind, _, k in (name.partition("@") for name in metrics)]
    rows: list[tuple[str, list[str]]] = []
    for model in history.models:
        test = history.tested(model)
        epoch = history.final.get(f"final/{model}/best_epoch")
        rows.append(("", [model_name(model, history), "" if epoch is None else f"{epoch:.0f}", *(_number(test.get(name)) for name in metrics), ""]))
        for m in history.modalities:
            view, teacher = test.get(f"only/{m}/{METRIC}"), history.tested(f"teacher/{m}").get(METRIC)
            if view is not None:
                cells = [_number(test.get(f"only/{m}/{name}")) for name in metrics]
                rows.append(("view", [f"its {m} view", "", *cells, f"{view / teacher:.0%}" if teacher else ""]))
        for prefix, label in OTHER_RANKINGS.items():
            if f"{prefix}{METRIC}" in test:
                rows.append(("view", [label, "", *(_number(test.get(f"{prefix}{name}")) for name in metrics), ""]))
    caption = "Every model on the test set, all items ranked; NDCG is the standard one. Last column: Recall@20 over that of the modality's teacher."
    return "<h2>Final table</h2>" + table(caption, ["model", "best epoch", *labels, "of its teacher"], rows)


def group_tables(history: RunHistory) -> str:
    """Recall by groups of users and of items, where the run has computed them."""
    row = next((row for row in reversed(history.rows) if row["event"] == "groups"), None)
    if row is None:
        return ""
    parts = ["<h2>For whom, and for which items</h2>"]
    captions = {"users": "Recall@20 by the users' number of training items", "items": "Recall@20 by the items' number of training users"}
    for kind, caption in captions.items():
        entries = [entry for entry in row["groups"] if entry["kind"] == kind]
        groups = list(dict.fromkeys(entry["group"] for entry in entries))
        found = {(entry["model"], entry["group"]): entry for entry in entries}
        counts = {group: next(entry["n"] for entry in entries if entry["group"] == group) for group in groups}
        unit = "users" if kind == "users" else "test interactions"
        columns = ["model", *(f"{group} ({counts[group]:,} {unit})" for group in groups)]
        models = list(dict.fromkeys(entry["model"] for entry in entries))
        rows = [("", [model_name(model, history), *(_number(found[model, group][METRIC]) for group in groups)]) for model in models]
        parts.append(table(caption, columns, rows))
    return "".join(parts)


def model_name(model: str, history: RunHistory) -> str:
    """A model's name for people."""
    student = "distilled student" if history.distilled else "student (no distillation)"
    return {"plain": "plain student", "student": student}.get(model, f"teacher {model.removeprefix('teacher/')}")


def _figure(drawing: Drawing) -> str:
    title, caption = html.escape(drawing.title), html.escape(drawing.caption)
    return f'<figure role="img" aria-label="{title}"><h2>{title}</h2>{svg(drawing)}<figcaption>{caption}</figcaption></figure>'


def svg(drawing: Drawing) -> str:
    """A figure as inline SVG that takes the width it is given; ids carry the figure's name, so that two on a page do not mix."""
    out = io.StringIO()
    with rc_context({"svg.hashsalt": drawing.name}):
        drawing.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)


def _configuration(history: RunHistory) -> str:
    if not history.config:
        return ""
    known = {html.escape(key): html.escape(str(value)) for key, value in history.config.items() if value != ""}
    rows = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in known.items())
    return f"<details><summary>Configuration as resolved</summary><dl>{rows}</dl></details>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
