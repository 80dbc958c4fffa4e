"""Memory of a benchmark's own process."""

from __future__ import annotations

from pathlib import Path


def peak_mb() -> float:
    """Peak resident memory of this process in MB (Linux). Not getrusage's, which goes back to the process that this one was forked from."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
