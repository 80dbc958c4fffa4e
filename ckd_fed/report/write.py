"""Write a run's report beside its record."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from ckd_fed.analysis.history import read_history
from ckd_fed.files import write_atomically


def write_report(directory: Path, target: Path | None = None) -> Path:
    """Write ``report.html`` and a PNG of each figure.

    Args:
        directory: of the run.
        target: folder to write to; by default ``report/`` in the run's.

    Returns:
        The HTML file.

    Raises:
        DataError: the run's record cannot be read.
        OSError: the folder cannot be written.
    """
    from ckd_fed.report.figures import FIGURES
    from ckd_fed.report.html import page
    from ckd_fed.report.style import styled
    from ckd_fed.report.words import describe

    history = read_history(directory)
    folder = target or directory / "report"
    with styled():
        drawings = [drawing for draw in FIGURES if (drawing := draw(history)) is not None]
        text = page(history, describe(history), drawings)
        for drawing in drawings:
            out = io.BytesIO()
            drawing.figure.savefig(out, format="png", dpi=160)
            write_atomically(folder / f"{drawing.name}.png", out.getvalue())
    write_atomically(folder / "report.html", text.encode())
    return folder / "report.html"


def report_quietly(directory: Path, write: Callable[[str], None]) -> None:
    """Write the report at the end of a run; a report that cannot be written is one line, never the run's failure."""
    try:
        write(f"report: {write_report(directory)}")
    except Exception as error:
        write(f"the report could not be written ({type(error).__name__}: {' '.join(str(error).split())[:200]}); `ckd-fed report` tries again")
