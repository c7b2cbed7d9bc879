"""The one family of errors that a user of this package has to know."""

from __future__ import annotations


class EzhoiDiffusionError(Exception):
    """Something a user can act on: the message says what happened, where, and what to do next.

    The command line prints the message alone, without a traceback, and exits with status 2. Every
    subclass lives next to the code that raises it.
    """
