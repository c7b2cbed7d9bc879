"""A set of rules, and how something is checked against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError

T = TypeVar("T")
Rule = Callable[[T], "str | None"]
"""Returns what is wrong with its argument in words, or None. Its docstring is the rule."""


class ConformanceError(EzhoiDiffusionError):
    """A bridge or a fit breaks rules. The message lists them all.

    Attributes:
        broken: The name of each broken rule -> what happened.
    """

    def __init__(self, what: str, rules: Mapping[str, Rule[T]], broken: Mapping[str, str]) -> None:
        self.broken = dict(broken)
        listed = "".join(f"\n- {name}: {rules[name].__doc__} Here {words}." for name, words in broken.items())
        super().__init__(f"{what} breaks {len(broken)} of {len(rules)} rules:{listed}")


def apply_rules(what: str, tried: T, rules: Mapping[str, Rule[T]], *, basic: Iterable[str]) -> None:
    """Apply all rules to `tried`, but none after a broken basic rule, which would break the others too.

    Args:
        what: What is checked, in words.
        tried: What every rule gets.
        rules: The rules by name.
        basic: Names of the basic rules.

    Raises:
        ConformanceError: Some rules are broken.
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
