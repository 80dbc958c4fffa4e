"""The documented use from Python, word for word."""

import re
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_documented_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CKD_FED_HOME", str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    exec(compile(code, DOCUMENT.name, "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    recalls = [float(line.rpartition(" ")[2]) for line in lines if "recall@20" in line]
    assert len(lines) == 5
    assert recalls[0] == max(recalls) > 0.3  # the joint view, and far from chance


def test_what_the_document_names_is_there():
    text = DOCUMENT.read_text()
    for name in re.findall(r"`(ckd_fed(?:\.\w+)+)", text):
        module, _, attribute = name.rpartition(".")
        try:
            __import__(name)
        except ModuleNotFoundError:
            assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
