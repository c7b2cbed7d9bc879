"""The rules that every bridge keeps, as checks that need no test runner."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ezhoi_diffusion.bridge_plugin import Bridge, Load
from ezhoi_diffusion.features.statistics import unit
from ezhoi_diffusion.testing.rules import Rule, apply_rules

ROUNDING = 1e-4  # of the largest value: more than another order of summation changes, and less than half precision
MANY = 2500  # rows in one call: more than any comparison gives
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Trial:
    """A bridge under test. Every call gets rows of its own, so that no rule can spoil another."""

    load: Load
    folder: Path | None
    dim: int
    device: torch.device

    def loaded(self) -> Bridge:
        """The bridge as a host has it."""
        bridge: Any = self.load(self.folder)
        return bridge.to(self.device) if isinstance(bridge, nn.Module) else bridge

    @cached_property
    def bridge(self) -> Bridge:
        """The one that most rules are held against."""
        return self.loaded()

    @property
    def row_by_row(self) -> bool:
        """What the bridge says of itself."""
        return bool(getattr(self.bridge, "row_by_row", False))

    def rows(self, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """[count, D] as a host's are: in a cone, of norms around 8."""
        draw = torch.Generator().manual_seed(seed)
        cone, noise, length = (
            torch.randn(n, width, generator=draw, dtype=torch.float32)
            for n, width in ((1, self.dim), (count, self.dim), (count, 1))
        )
        return (unit(cone + noise) * (8 + length)).to(self.device, dtype)


def check_bridge(load: Load, folder: Path | None = None, *, dim: int, device: torch.device | str = "cpu") -> None:
    """Hold the bridge that `load(folder)` gives against every rule for bridges, with rows [N, dim] on `device`.

    The random generators and torch's settings are left as they are. Raises ConformanceError, which lists all rules that
    are broken.
    """
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with seeded(0):
            apply_rules("the bridge", Trial(load, folder, dim, torch.device(device)), BRIDGE_RULES, basic=BASIC)
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])


def _loading(trial: Trial) -> str | None:
    """What is loaded twice from one folder gives the same, bit for bit, whatever the state of the random generators."""
    results = []
    for seed in (1, 2):
        with seeded(seed):
            results.append(trial.loaded()(trial.rows(9)))
    return None if torch.equal(*results) else f"the second differs by up to {_distance(*results):.3g}"


def _shape(trial: Trial) -> str | None:
    """Rows [N, D] become a tensor [N, D]."""
    for count in (5, 1):
        result: Any = trial.bridge(trial.rows(count))
        if not isinstance(result, Tensor):
            return f"a {type(result).__name__} was returned"
        if result.shape != (count, trial.dim):
            return f"{list(result.shape)} was returned for {[count, trial.dim]}"
    return None


def _device(trial: Trial) -> str | None:
    """The result is on the device of the rows."""
    found, rows = trial.bridge(trial.rows(5)).device, trial.rows(5)
    return None if found == rows.device else f"it is on {found} for rows on {rows.device}"


def _dtype(trial: Trial) -> str | None:
    """The result has the dtype of the rows: float32, float64, float16, bfloat16."""
    found = {dtype: trial.bridge(trial.rows(5, dtype)).dtype for dtype in DTYPES}
    return ", ".join(f"{of} was returned for {dtype}" for dtype, of in found.items() if of != dtype) or None


def _finite(trial: Trial) -> str | None:
    """Finite rows stay finite, in each of these dtypes."""
    wrong = [dtype for dtype in DTYPES if not trial.bridge(trial.rows(64, dtype)).isfinite().all()]
    return f"NaN or infinity was returned for rows of {', '.join(map(str, wrong))}" if wrong else None


def _empty(trial: Trial) -> str | None:
    """No rows, [0, D], become [0, D]."""
    result = trial.bridge(trial.rows(0))
    return None if result.shape == (0, trial.dim) else f"{list(result.shape)} was returned"


def _zero_rows(trial: Trial) -> str | None:
    """Rows of zeros, among others and alone, stay finite."""
    among, alone = trial.rows(6), torch.zeros_like(trial.rows(3))
    among[2] = 0
    wrong = not all(trial.bridge(rows).isfinite().all() for rows in (among, alone))
    return "NaN or infinity was returned" if wrong else None


def _input(trial: Trial) -> str | None:
    """The rows that are given are not written into."""
    for dtype in (torch.float32, torch.float64):
        given = trial.rows(9, dtype)
        trial.bridge(given)
        if not torch.equal(given, trial.rows(9, dtype)):
            return f"rows of {dtype} were changed; make a new tensor instead of x += … or x.add_(…)"
    return None


def _own_result(trial: Trial) -> str | None:
    """A result that was returned stays as it is when the bridge is called again."""
    result = trial.bridge(trial.rows(9))
    kept = result.clone()
    trial.bridge(trial.rows(9, seed=1))
    return None if torch.equal(result, kept) else "it was overwritten by the next; return a new tensor each time"


def _deterministic(trial: Trial) -> str | None:
    """The same rows give the same result, bit for bit, whatever came between."""
    first = trial.bridge(trial.rows(9)).clone()
    trial.bridge(trial.rows(17, seed=1))
    again = trial.bridge(trial.rows(9))
    return None if torch.equal(first, again) else f"the second result differs by up to {_distance(first, again):.3g}"


def _random_numbers(trial: Trial) -> str | None:
    """No random number is drawn: the global generators of torch, numpy and python stay, and their seed does not matter."""
    results = []
    for seed in (1, 2):
        with seeded(seed):
            before = _random_states(trial.device)
            results.append(trial.bridge(trial.rows(9)).clone())
            after = _random_states(trial.device)
        drawn = [name for name, state in after.items() if state != before[name]]
        if drawn:
            return f"the generator of {' and '.join(drawn)} moved"
    return None if torch.equal(*results) else "another seed gave another result"


def _gradient(trial: Trial) -> str | None:
    """No gradient is tracked, and whether others are is left as it was."""
    for tracking in (True, False):
        with torch.set_grad_enabled(tracking):
            result = trial.bridge(trial.rows(5))
            if torch.is_grad_enabled() != tracking:
                return "gradients are " + ("off" if tracking else "on") + " for the whole process after the call"
        if result.requires_grad:
            return "the result requires one; decorate the call with @torch.no_grad()"
    return None


def _attributes(trial: Trial) -> str | None:
    """Attributes, where there are any, are what a host expects: provenance a dict or None, context a dict of tensors, row_by_row, depends_on_seed and control bool, settings a tuple of names, sweep and override callable."""  # fmt: skip
    absent = object()
    found = {name: getattr(trial.bridge, name, absent) for name in ATTRIBUTES}
    wrong = {name: value for name, value in found.items() if value is not absent and not ATTRIBUTES[name](value)}
    return ", ".join(f"{name} is {value!r:.60}" for name, value in wrong.items()) or None


def _row_by_row(trial: Trial) -> str | None:
    """With row_by_row = True each row alone becomes what it becomes among others."""
    if not trial.row_by_row:
        return None
    together, rows = trial.bridge(trial.rows(9)), trial.rows(9)
    return _moved(together, torch.cat([trial.bridge(row.clone()) for row in rows.split(1)]))


def _chunks(trial: Trial) -> str | None:
    """With row_by_row = True many rows in one call, here 2500, become what they become in several calls."""
    if not trial.row_by_row:
        return None
    together, rows = trial.bridge(trial.rows(MANY)), trial.rows(MANY)
    return _moved(together, torch.cat([trial.bridge(part.clone()) for part in rows.split(MANY * 2 // 5)]))


def _order(trial: Trial) -> str | None:
    """Rows in another order become the same rows in that order."""
    order = torch.randperm(33, generator=torch.Generator().manual_seed(3)).to(trial.device)
    return _moved(trial.bridge(trial.rows(33))[order], trial.bridge(trial.rows(33)[order]))


def _memory_layout(trial: Trial) -> str | None:
    """How the rows lie in memory does not matter: transposed, or every second row of others."""
    expected, rows = trial.bridge(trial.rows(9)), trial.rows(9)
    spread = torch.stack([rows, rows + 1], 1).flatten(0, 1)[::2]
    return _moved(expected, trial.bridge(rows.T.contiguous().T)) or _moved(expected, trial.bridge(spread))


def _autocast(trial: Trial) -> str | None:
    """Under torch.autocast the result is what it is without."""
    with torch.autocast(trial.device.type, dtype=torch.bfloat16):
        result = trial.bridge(trial.rows(9))
    return _moved(
        trial.bridge(trial.rows(9)), result, "; compute inside `with torch.autocast(x.device.type, enabled=False):`"
    )


def _default_dtype(trial: Trial) -> str | None:
    """torch's default dtype is neither changed nor of influence."""
    expected = trial.bridge(trial.rows(9))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = trial.bridge(trial.rows(9))
        after = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(before)
    if after != torch.float64:
        return f"it is {after} after the call"
    return _moved(expected, result, "; give new tensors the rows' dtype")


def _moved(expected: Tensor, result: Tensor, remedy: str = "") -> str | None:
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return f"{result.dtype} {list(result.shape)} came for {expected.dtype} {list(expected.shape)}{remedy}"
    distance = _distance(expected, result)
    return None if distance <= ROUNDING else f"it differs by {distance:.2g} of the largest value{remedy}"


def _distance(expected: Tensor, result: Tensor) -> float:
    result, expected = result.detach(), expected.detach()
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _random_states(device: torch.device) -> dict[str, bytes]:
    numpy: Any = np.random.get_state(legacy=False)
    keys = numpy["state"].pop("key").tobytes()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": keys + repr(numpy).encode(),
        "python": repr(random.getstate()).encode(),
    }
    if device.type == "cuda":
        states["torch on the device"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global random generators with this seed inside, and as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    "provenance": lambda value: value is None or isinstance(value, dict),
    "context": lambda value: isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values()),
    "row_by_row": lambda value: isinstance(value, bool),
    "depends_on_seed": lambda value: isinstance(value, bool),
    "control": lambda value: isinstance(value, bool),
    "settings": lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    "sweep": callable,
    "override": callable,
}
BASIC = ("shape", "device")
BRIDGE_RULES: dict[str, Rule[Trial]] = {
    "shape": _shape,
    "device": _device,
    "dtype": _dtype,
    "finite": _finite,
    "empty": _empty,
    "zero rows": _zero_rows,
    "input": _input,
    "own result": _own_result,
    "deterministic": _deterministic,
    "random numbers": _random_numbers,
    "gradient": _gradient,
    "row by row": _row_by_row,
    "chunks": _chunks,
    "order": _order,
    "memory layout": _memory_layout,
    "autocast": _autocast,
    "default dtype": _default_dtype,
    "attributes": _attributes,
    "loading": _loading,
}
