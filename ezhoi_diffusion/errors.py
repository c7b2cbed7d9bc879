"""The one family of errors that a user of this package has to know."""

from __future__ import annotations


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
