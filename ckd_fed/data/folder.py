"""Writing a folder so that nobody ever sees half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckd_fed.errors import DataError


@contextmanager
def whole_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden folder to fill, which becomes ``destination`` once the block ends without an error and is gone if it does not.

    Args:
        destination: folder to make.
        replace: put it in the place of one that is there; kept if anything fails.

    Raises:
        DataError: the destination exists. One from within the block is passed on without the hidden folder's name, which would say nothing.
    """
    if destination.exists() and not replace:
        raise DataError(f"{destination} exists; choose another name, or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    fresh, old = temporary / "new", temporary / "old"
    try:
        fresh.mkdir()
        yield fresh
        try:
            if destination.exists():
                os.rename(destination, old)
            os.rename(fresh, destination)
        except BaseException:  # Ctrl-C too: the folder that was there is about to be deleted with the hidden one
            if old.exists() and not destination.exists():
                os.rename(old, destination)
            raise
    except DataError as error:
        raise DataError(str(error).replace(f"{fresh}/", "").replace(str(fresh), "the dataset")) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
