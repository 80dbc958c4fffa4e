"""A report of every kind of run: complete, self-contained, legible, and never in a run's way."""

import itertools
from html.parser import HTMLParser

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from ckd_fed.analysis.history import read_history
from ckd_fed.cli import main
from ckd_fed.config import resolve
from ckd_fed.errors import DataError
from ckd_fed.report import write as report_write
from ckd_fed.report.diagnosis import DISTILLED, PLAIN, TEACHER, diagnose
from ckd_fed.report.figures import FIGURES
from ckd_fed.report.style import styled
from ckd_fed.report.words import describe
from ckd_fed.training.central import train

ALL = {"diagnosis", "imbalance", "effects", "learning", "time"}
KINDS = {
    "two modalities": ({}, ALL),
    "three modalities": ({"modalities": ("image", "text", "audio")}, ALL),
    "federated": ({"traffic": 3e6}, ALL | {"traffic"}),
    "one round": ({"rounds": 1}, ALL),
    "many rounds": ({"rounds": 200}, ALL),
    "no plain student": ({"plain": False}, ALL),
    "no distillation": ({"distilled": False}, ALL - {"imbalance", "effects"}),
    "no effects": ({"effects": False}, ALL - {"effects"}),
    "scores without features": ({"effects": False, "views": False}, ALL - {"imbalance", "effects"}),
    "failed while distilling": ({"end": "OSError: no space left on device"}, ALL),
    "failed at once": ({"end": "TrainingError: nan", "rounds": 0}, set()),
    "still going on": ({"end": ""}, ALL),
}


class Page(HTMLParser):
    """Tags, references and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.words = set(), [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data):
        self.words.append(data)


def drawings(directory):
    history = read_history(directory)
    with styled():
        return [drawing for draw in FIGURES if (drawing := draw(history))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_its_report(kind, write_run):
    options, expected = KINDS[kind]
    directory = write_run(**options)
    path = report_write.write_report(directory)
    assert {image.stem for image in path.parent.glob("*.png")} == expected
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in path.parent.glob("*.png"))
    text = path.read_text()
    assert text.count("<figure") == text.count("<svg") == len(expected)
    assert "nan" not in Page(text).text.replace("TrainingError: nan", "")
    if options.get("end"):
        assert options["end"] in Page(text).text


def test_the_page_needs_nothing_else(write_run):
    text = report_write.write_report(write_run(traffic=1e6)).read_text()
    page = Page(text)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "img"}
    assert "@import" not in text
    assert "url(http" not in text


@pytest.mark.parametrize("kind", ["three modalities", "federated", "one round"])
def test_no_label_covers_another_or_leaves_the_figure(kind, write_run):
    for drawing in drawings(write_run(**KINDS[kind][0])):
        figure = drawing.figure
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _hidden(axis)}
        shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden]
        drawn = {text: text.get_window_extent(renderer) for text in shown}
        for text, box in drawn.items():
            assert box.x0 >= -0.5, (drawing.name, text)
            assert box.y0 >= -0.5, (drawing.name, text)
            assert box.x1 <= figure.bbox.x1 + 0.5, (drawing.name, text)
            assert box.y1 <= figure.bbox.y1 + 0.5, (drawing.name, text)
        for (one, first), (other, second) in itertools.combinations(drawn.items(), 2):
            assert not first.overlaps(second), (drawing.name, one, other)


def _hidden(axis):
    """Tick labels that are not drawn: those outside the limits of their axis, and those of a shared axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [label for tick in ticks for label in (tick.label1, tick.label2) if not low <= tick.get_loc() <= high or not label.get_visible()]


def test_lines_and_bars_are_told_apart_without_colour(write_run):
    for drawing in drawings(write_run(modalities=("image", "text", "audio"))):
        for axes in drawing.figure.axes:
            lines = [(line.get_linestyle(), line.get_marker(), str(line._dash_pattern)) for line in axes.lines if line.get_label()[0] != "_"]
            assert len(lines) == len(set(lines)), drawing.name
    (bars,) = drawings(write_run("other"))[0].figure.axes
    assert len({(patch.get_hatch(), round(sum(patch.get_facecolor()[:3]), 1)) for patch in bars.patches}) == 3


def test_the_diagnosis_is_that_of_the_final_row(write_run):
    found = diagnose(read_history(write_run(modalities=("image", "text", "audio"))))
    assert found.views["audio"] == pytest.approx({TEACHER: 0.08, PLAIN: 0.032, DISTILLED: 0.056})
    assert found.reached("audio", DISTILLED) == pytest.approx(0.7)
    assert found.reached("audio", TEACHER) is None
    assert found.joint == {PLAIN: 0.33, DISTILLED: 0.41}


def test_an_unfinished_run_is_diagnosed_on_validation(write_run):
    found = diagnose(read_history(write_run(end="")))
    assert "validation" in found.where
    assert found.views["image"][TEACHER] == pytest.approx(0.15)
    assert found.views["image"][PLAIN] == pytest.approx(0.15 * 0.6)
    assert found.reached("image", DISTILLED) == pytest.approx(0.97, abs=0.01)


def test_the_verdict_names_the_starved_and_whether_they_were_cured(write_run):
    two = describe(read_history(write_run("two")))
    assert two.verdict.startswith("Trained without distillation, the student starves image (under 90% of the teacher). Distillation cured it.")
    assert "0.3300 without and 0.4100 with distillation (+24.2%)" in two.verdict
    three = describe(read_history(write_run("three", ("image", "text", "audio"))))
    assert "starves image and audio" in three.verdict
    assert "helped, but audio is still behind its teacher" in three.verdict
    without = describe(read_history(write_run("without", effects=False, views=False))).verdict
    assert "do not depend on features" in without
    assert "0.4100 inside the distilled student" in without
    assert any("which is 70% of that" in line for line in three.imbalance)
    assert "nothing travelled" in " ".join(two.course)
    assert "24.0 MB travelled" in " ".join(describe(read_history(write_run("fed", traffic=3e6))).course)


def test_the_final_table_holds_the_final_row(write_run):
    page = Page(report_write.write_report(write_run()).read_text())
    for text in ("distilled student", "0.4100", "its image view", "97%", "105%", "NDCG is the standard one"):
        assert text in page.text


def test_what_users_wrote_is_escaped(write_run):
    text = report_write.write_report(write_run(end="<script>alert(1)</script>")).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_resumed_round_counts_once(write_run):
    directory = write_run()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("\n".join(line for line in lines if '"distillation"' in line) + "\n")
    history = read_history(directory)
    assert [row["round"] for row in history.distillation] == list(range(3, 9))
    assert history.seconds_by_participant()["student"] == dict.fromkeys(range(3, 9), 1.5)


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path, write_dataset, monkeypatch, capsys):
    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(report_write, "write_report", full)
    folder = write_dataset("toy", n_users=40)
    small = {"training.epochs": 2, "training.validate-every": 2, "model.embedding-dim": 4, "distillation.batch-size": 20, "tracking.wandb": "off"}
    result = train(resolve({"dataset": "toy", "data.dir": str(folder), "home": str(tmp_path), "name": "mine", **small}))
    assert result.outcomes["student"].test
    assert "report could not be written (OSError: no space left" in capsys.readouterr().out


def test_the_command_finds_a_run_by_name_or_folder(tmp_path, write_run, monkeypatch, capsys, refuses):
    directory = write_run("runs/mine")
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    for name in ("mine", str(directory)):
        main(["report", name, "--output", str(tmp_path / "out")])
        assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    with pytest.raises(SystemExit):
        main(["report", "mien"])
    assert "unknown run 'mien'; did you mean 'mine'?" in capsys.readouterr().err
    (directory / "metrics.jsonl").write_text("")
    refuses(DataError, lambda: read_history(directory), "holds no rows")
