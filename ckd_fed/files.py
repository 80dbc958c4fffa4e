"""Paths as users give them, files of which no reader ever sees half, and keeping other processes out."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckd_fed.errors import CkdError, ConfigError


def expanded(text: str, what: str) -> Path:
    """A path as a user gives it, with ``~`` and ``~name`` for the folder of a user.

    Args:
        text: the path.
        what: the option or key that it is the value of.

    Raises:
        ConfigError: it is empty, or there is no such user.
    """
    if not text:
        raise ConfigError(f"{what} is ''; the path of a file or folder is needed (a full stop is the current folder)")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0]
        raise ConfigError(
            f"{what} is {text!r}, and this machine knows no folder for {user}; write it out, or ./{user} for what is called so"
        ) from None


def check_folder(path: Path, what: str) -> None:
    """See that a path is a folder or can become one.

    Raises:
        ConfigError: a file is in its place, or in that of a folder above it.
    """
    nearest = next((place for place in (path, *path.parents) if os.path.lexists(place)), path.parent)
    if not nearest.is_dir():
        raise ConfigError(f"{what} is {str(path)!r}, but {nearest} is no folder; a folder is needed, one that is there or one to be made")


def write_atomically(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file under another name in the same folder, flush it to disk, and rename it into place.

    Args:
        path: of the file.
        content: of the file.
        private: nobody but its owner may read it; else who may is for the process' umask to say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def held(path: Path, busy: CkdError) -> Iterator[None]:
    """Hold a file or a folder that is there for this process; the operating system lets go of it however the process ends.

    Where the file system has no such locks (of folders, over NFS) nothing is held.

    Raises:
        CkdError: ``busy``, if another process holds it.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
