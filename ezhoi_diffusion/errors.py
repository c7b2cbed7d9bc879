"""The one family of errors that a user of this package has to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EzhoiDiffusionError(Exception):
    """Something a user can act on: the message says what happened, where, and what to do next.

    The command line prints the message alone, without a traceback, and exits with `status`. Every
    subclass lives next to the code that raises it.
    """

    status = 2


class Interrupted(EzhoiDiffusionError):
    """The work was asked to end (SIGTERM, SIGINT), and stopped where it can go on: the message says how.

    Its status is EX_TEMPFAIL of sysexits.h: a scheduler that sees 75 may give the same command again.
    """

    status = 75


@contextmanager
def attributed_to(what: str, kind: type[EzhoiDiffusionError] = EzhoiDiffusionError) -> Iterator[None]:
    """Around a call of third-party code, which may raise anything: raise it as `kind`, with `what` in front.

    Errors of this family pass as they are.
    """
    try:
        yield
    except EzhoiDiffusionError:
        raise
    except Exception as error:
        raise kind(f"{what} raised {type(error).__name__}: {error}") from error
