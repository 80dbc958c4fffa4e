"""Compiling the C source that comes with the package, once a machine and version of it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

SWITCH = "CKD_FED_KERNELS"
_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
_NATIVE = "-march=native"  # which not every compiler knows for every processor
_TIMEOUT = 120  # seconds


_kept_in: list[Path] = []


def keep_in(folder: Path) -> None:
    """Keep the library of this machine in a folder; of the first that is named before it is loaded."""
    _kept_in.append(folder)


class Built(NamedTuple):
    """The compiled library, or None and why there is none."""

    library: ctypes.CDLL | None
    found: str


@cache
def built() -> Built:
    """The library, loaded; compiled first where this machine has not yet.

    It is kept where :func:`keep_in` says, else in ``cache/kernels`` of $CKD_FED_HOME or ~/.ckd_fed, under a name that tells source, compiler and
    processor. Where that folder cannot be written to, each process compiles its own. The compiler is $CC, by default cc.
    """
    if os.environ.get(SWITCH, "").lower() in ("0", "off", "no", "false"):
        return Built(None, f"switched off by {SWITCH}={os.environ[SWITCH]}")
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    program = shutil.which(compiler[0])
    if program is None:
        return Built(None, f"there is no C compiler {compiler[0]!r}")
    command = [program, *compiler[1:]]
    name = f"kernels-{_key(command)}.so"
    folder = _kept_in[0] if _kept_in else Path(os.environ.get("CKD_FED_HOME") or "~/.ckd_fed").expanduser() / "cache" / "kernels"
    with suppress(OSError):  # not there yet, or of a file system from which nothing is loaded
        return Built(ctypes.CDLL(str(folder / name)), str(folder / name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            _compile(command, Path(temporary) / name)
            os.replace(Path(temporary) / name, folder / name)
        return Built(ctypes.CDLL(str(folder / name)), str(folder / name))
    except OSError:
        pass
    except subprocess.SubprocessError as error:
        return Built(None, _reason(error))
    try:
        with tempfile.TemporaryDirectory(prefix="ckd_fed_kernels_") as temporary:  # a library that is loaded outlives its file
            _compile(command, Path(temporary) / name)
            return Built(ctypes.CDLL(str(Path(temporary) / name)), f"compiled for this process alone: {folder} cannot be used")
    except (OSError, subprocess.SubprocessError) as error:
        return Built(None, _reason(error))


def _sources(pattern: str) -> list[Path]:
    return sorted(_FOLDER.glob(pattern))


def _compile(command: list[str], to: Path) -> None:
    """Compile for this very processor, or for any of its kind where the compiler cannot."""

    def attempt(*flags: str) -> None:
        whole = [*command, *_FLAGS, *flags, "-o", str(to), *map(str, _sources("*.c")), "-lm"]
        subprocess.run(whole, check=True, capture_output=True, text=True, timeout=_TIMEOUT)

    try:
        attempt(_NATIVE)
    except subprocess.CalledProcessError:
        attempt()


def _key(command: list[str]) -> str:
    """Of source, compiler and processor: a home may be shared by machines of several kinds."""
    processor = f"{platform.machine()} {platform.processor()}"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features"))
    changed = Path(command[0]).stat().st_mtime_ns
    parts = [*(source.read_text() for source in _sources("*.[ch]")), *command, str(changed), *_FLAGS, _NATIVE, processor]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    lines = [line for line in (getattr(error, "stderr", "") or str(error)).splitlines() if line.strip()]
    return f"compiling failed: {lines[0] if lines else type(error).__name__}"
