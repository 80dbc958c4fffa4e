"""Errors that a user can mend, each carrying one clear line.

Everything the package raises on purpose derives from :class:`CkdError`; the command line and the Flower apps print its message
without a traceback. Anything else that escapes is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2000  # characters of what is said about a reply


class CkdError(Exception):
    """Base of every error with a message meant for the user: it names the thing, shows the value and says what to do."""


class ConfigError(CkdError):
    """A configuration key or value that cannot be used."""


class DataError(CkdError):
    """A dataset on disk that is missing, damaged or inconsistent."""


class EnrolmentError(CkdError):
    """The nodes present do not make up a federation that can run."""


class ReplyError(CkdError):
    """A node's reply that failed its checks and was not used.

    Its text may repeat what the node sent: it is kept to a length, and to characters that print, so that it passes for nothing else.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text[:_LONGEST]) + "…" * (len(text) > _LONGEST))


class LostError(ReplyError):
    """No reply, because the node or its process is gone: it may come back."""


class FinalError(ReplyError):
    """A failure that the same request would meet again: neither another try nor a resumed run helps."""


class TrainingError(CkdError):
    """Training cannot go on (for example: the loss is no longer finite)."""


class TooLittleMemoryError(TrainingError):
    """A step took more memory than there was: elsewhere, or later, there may be more."""


def unknown(kind: str, value: object, choices: Iterable[object]) -> str:
    """Message for a value outside a closed set: names it, suggests the nearest choice and lists them all.

    Args:
        kind: what the value is supposed to be, for example ``"backbone"``.
        value: the value given.
        choices: the values allowed.
    """
    names = sorted(str(choice) for choice in choices)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {str(value)!r}{hint} (choices: {', '.join(names)})"
