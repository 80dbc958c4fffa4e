"""configs/deployment shows what `ckd-fed cluster init` writes; made anew with: python tests/deploy/test_examples.py."""

import sys
import tempfile
from pathlib import Path

from ckd_fed.cli import main

EXAMPLES = Path(__file__).parents[2] / "configs" / "deployment"
PLACE = "/srv/ckd/lab"
COMMAND = ["--host", "gpu0.example", "--teachers", "image,text", "--students", "2", "--data-dir", "/data/baby", "--device", "student-1=cuda:1"]


def written(folder: Path) -> dict[str, str]:
    """Every text file of a new cluster but keys and certificates, as if it lay at PLACE."""
    main(["cluster", "init", str(folder), *COMMAND])
    kinds = (".sh", ".toml", ".service")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in kinds)
    return {str(path.relative_to(folder)): path.read_text().replace(str(folder.resolve()), PLACE) for path in paths}


def test_the_examples_are_what_the_command_writes(tmp_path, capsys):
    there = {str(path.relative_to(EXAMPLES)): path.read_text() for path in EXAMPLES.rglob("*") if path.is_file() and path.name != "README.md"}
    assert there == written(tmp_path / "lab")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, text in written(Path(place) / "lab").items():
            (EXAMPLES / name).parent.mkdir(parents=True, exist_ok=True)
            (EXAMPLES / name).write_text(text)
            if name.endswith(".sh"):
                (EXAMPLES / name).chmod(0o755)
    sys.exit()
