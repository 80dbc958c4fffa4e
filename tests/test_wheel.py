"""What is installed from a wheel, and not from a checkout, is whole."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

IMPORTS = """
import sys; sys.path.insert(0, sys.argv[1])
import server.app, clients.app, ckd_fed.config
for module in (server.app, clients.app, ckd_fed.config):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
ckd_fed.config.resolve({"backbone": "freedom", "recipe": "no-generic"})
print(ckd_fed.config.configs_directory())
"""


def test_a_wheel_has_both_apps_and_the_configurations(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = archive.namelist()
    assert {f"{package}/py.typed" for package in ("ckd_fed", "server", "clients")} <= set(names)
    assert {f"ckd_fed/kernels/{source}" for source in ("adam.c", "linear.c", "pieces.h", "stream.c", "triples.c")} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    imported = subprocess.run([sys.executable, "-c", IMPORTS, str(installed)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.strip() == str(installed / "ckd_fed" / "configs")
