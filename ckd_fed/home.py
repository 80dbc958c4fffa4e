"""Where things live on a machine, and which code runs there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ckd_fed import __version__
from ckd_fed.config import Config
from ckd_fed.errors import ConfigError
from ckd_fed.files import check_folder, expanded


def home(config: Config, node_config: Mapping[str, object] | None = None) -> Path:
    """The folder of data, runs and workspaces: the node's own ``home``, else the configuration's, else $CKD_FED_HOME, else ~/.ckd_fed.

    Never the current directory: under Flower it belongs to somebody else. On a real node the configuration's does not count: it is the
    server's, and would let it choose where a teacher looks up what it gave away so far.
    """
    foreign = node_config is not None and "partition-id" not in node_config
    given = str((node_config or {}).get("home", "")) or ("" if foreign else config.home) or os.environ.get("CKD_FED_HOME", "") or "~/.ckd_fed"
    path = expanded(given, "home")
    if not path.is_absolute():
        raise ConfigError(f"home is {given!r}; an absolute path is needed, because Flower starts the apps in folders of its own")
    check_folder(path, "home")
    return path


@cache
def code_version() -> str:
    """Version and hash of the installed sources, for example ``0.1.0+3f2a9c81``: nodes of one run must agree on it."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for package in (root, root.parent / "server", root.parent / "clients"):
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c", ".h")):
            digest.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"
