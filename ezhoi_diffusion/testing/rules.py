"""What a set of rules is, and how something is held against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError

T = TypeVar("T")
Rule = Callable[[T], "str | None"]
"""Says in words what is wrong with what it is given, or nothing; its docstring is the rule."""


class ConformanceError(EzhoiDiffusionError):
    """A bridge or a fit broke rules. broken: the name of each -> what happened; the message lists them all."""

    def __init__(self, what: str, rules: Mapping[str, Rule[T]], broken: Mapping[str, str]) -> None:
        self.broken = dict(broken)
        listed = "".join(f"\n- {name}: {rules[name].__doc__} Here {words}." for name, words in broken.items())
        super().__init__(f"{what} breaks {len(broken)} of {len(rules)} rules:{listed}")


def apply_rules(what: str, tried: T, rules: Mapping[str, Rule[T]], *, basic: Iterable[str]) -> None:
    """Apply all rules to `tried`; but none after a basic one that is broken, which would only be broken in consequence.

    Raises ConformanceError, which lists all that are broken.
    """
    broken: dict[str, str] = {}
    for name, rule in rules.items():
        try:
            words = rule(tried)
        except Exception as error:  # a third party's, which may raise anything
            words = f"{type(error).__name__} was raised: {error}"
        if words:
            broken[name] = words
            if name in basic:
                break
    if broken:
        raise ConformanceError(what, rules, broken)
