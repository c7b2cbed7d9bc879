"""The base class of all errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    r"""`text` with its control characters and those that change the direction of writing as escapes, but for \n and \t.

    Names in files and messages of plugins reach a terminal. They must not move its cursor, nor reorder what it shows.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class EzhoiDiffusionError(Exception):
    """An error that a user can act on: its message says what happened, where, and what to do.

    The command line prints the message without a traceback and exits with `status`. Every subclass lives next to the
    code that raises it.
    """

    status = 2

    def __str__(self) -> str:
        return printable(super().__str__())


class Interrupted(EzhoiDiffusionError):
    """SIGTERM or SIGINT came, and the work stopped where it can be resumed; the message says how.

    Its status is EX_TEMPFAIL of sysexits.h: a scheduler that sees 75 may run the same command again.
    """

    status = 75


@contextmanager
def attributed_to(what: str, kind: type[EzhoiDiffusionError] = EzhoiDiffusionError) -> Iterator[None]:
    """Raise whatever third-party code raises as `kind`, with `what` in front. Errors of this package pass as they are."""
    try:
        yield
    except (EzhoiDiffusionError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise kind(f"{what} raised {described(error)}") from error


def described(error: BaseException) -> str:
    """`Type: message` of what third-party code raised, whose own `__str__` may fail."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
