"""The result of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError

FEATURES, BRIDGE = "features", "bridge"
CAPTURE = "ezhoi-diffusion capture main_tip_finetune.py … --out FEATURES"
TRAIN = "ezhoi-diffusion train FEATURES --out BRIDGE"

Level = Literal["ok", "note", "warning", "problem"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        name: What was checked, as `features.norms`.
        level: ok; note, worth knowing; warning, may cost results or stop some runs; problem, does not work.
        found: What was found.
        fix: What to do; empty where there is nothing to do.
        details: Lines to print below, such as a table; often empty.
    """

    name: str
    level: Level
    found: str
    fix: str = ""
    details: str = ""

    def __str__(self) -> str:
        fix = f" -> {self.fix}" if self.fix else ""
        line = f"{self.level:8} {self.name:25} {self.found}{fix}".replace("\n", " ")
        return f"{line}\n{self.details}" if self.details else line


def ok(name: str, found: str, details: str = "") -> Finding:
    """Make a finding with nothing to do."""
    return Finding(name, "ok", found, details=details)


def attempt(name: str, action: Callable[[], T], fix: str) -> T | Finding:
    """Return what `action` returns, or its error as a problem.

    What is examined comes from elsewhere and may be anything, so any error counts as a finding about it.
    """
    try:
        return action()
    except EzhoiDiffusionError as error:
        return Finding(name, "problem", str(error), fix)
    except Exception as error:
        return Finding(name, "problem", f"cannot be examined ({type(error).__name__}: {error})", fix)


def run_check(name: str, check: Callable[[], Iterable[Finding]], fix: str) -> Iterator[Finding]:
    """Yield the findings of a check; if it ends with an error, yield those before it and the error as a problem."""
    findings: list[Finding] = []
    error = attempt(name, lambda: findings.extend(check()), fix)
    yield from findings
    if error is not None:
        yield error
