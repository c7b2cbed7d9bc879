"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ezhoi_diffusion.errors import EzhoiDiffusionError

FEATURES, BRIDGE = "features", "bridge"
CAPTURE = "ezhoi-diffusion run main_tip_finetune.py … --plugin capture --capture DIR"
TRAIN = "ezhoi-diffusion train FEATURES --out BRIDGE"

Level = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    level: ok; note, worth knowing; warning, likely to cost results or to stop some runs; problem, does not work.
    """

    name: str
    level: Level
    found: str
    fix: str = ""  # empty where there is nothing to do


def ok(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(name, "ok", found)


def run_check(name: str, check: Callable[[], Iterator[Finding]], fix: str) -> list[Finding]:
    """The findings of a check; if it ends with an error, those before it and the error as a problem.

    What a check looks at comes from elsewhere and may be anything, so any error counts as a finding about it.
    """
    findings: list[Finding] = []
    try:
        for finding in check():
            findings.append(finding)  # one by one: what was found before an error counts
    except EzhoiDiffusionError as error:
        findings.append(Finding(name, "problem", str(error), fix))
    except Exception as error:
        findings.append(Finding(name, "problem", f"cannot be examined ({type(error).__name__}: {error})", fix))
    return findings
