"""The rules for bridges, as checks that need no test runner."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ezhoi_diffusion.bridge import PROTOCOLS, Bridge, BridgeError, as_bridge
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.scoring.bridge import ScoreBridge
from ezhoi_diffusion.testing.rules import Rule, apply_rules

ROUNDING = 1e-4  # of the largest value: more than another order of summation changes, and less than half precision
MANY = 2500  # pair features in one call: more than any comparison gives
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


Load = Callable[[Path | None], object]


@dataclass(frozen=True)
class Trial:
    """A bridge under test. Every call gets features of its own, so that no rule can spoil another."""

    load: Load
    folder: Path | None
    dim: int
    device: torch.device

    def loaded(self) -> Bridge:
        """The bridge, loaded once more, on its device."""
        return as_bridge(self.load(self.folder)).to(self.device)

    @cached_property
    def bridge(self) -> Bridge:
        """The bridge that most rules check."""
        return self.loaded()

    def apply(self, features: Tensor, bridge: Bridge | None = None) -> Tensor:
        """Apply the bridge, or another one, to features [N, D] of one image."""
        result: Tensor = (bridge or self.bridge)(features, self.pairs(len(features)))
        return result

    def pairs(self, count: int) -> Pairs:
        """`count` pairs of one person with one object each, in an image of 640 by 480 pixels."""
        draw = torch.Generator().manual_seed(count)
        corner = torch.rand(count + 1, 2, generator=draw, dtype=torch.float32) * 300
        size = 20 + torch.rand(count + 1, 2, generator=draw, dtype=torch.float32) * 100
        return Pairs(
            image="made_up.jpg",
            batch_index=0,
            size=torch.tensor([480, 640], device=self.device),
            boxes=torch.cat([corner, corner + size], 1).to(self.device),
            scores=torch.rand(count + 1, generator=draw, dtype=torch.float32).to(self.device),
            classes=torch.arange(count + 1, device=self.device) % 3,
            pairing=torch.stack([torch.zeros(count, dtype=torch.long), 1 + torch.arange(count)]).to(self.device),
        )

    @property
    def takes_many_images(self) -> bool:
        """Whether features of many images may come in one call."""
        return self.bridge.row_by_row and not self.bridge.needs_pairs

    def features(self, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """[count, D] like EZ-HOI's pair features: in a cone, of norms around 8."""
        draw = torch.Generator().manual_seed(seed)
        cone, noise, length = (
            torch.randn(n, width, generator=draw, dtype=torch.float32)
            for n, width in ((1, self.dim), (count, self.dim), (count, 1))
        )
        return (F.normalize(cone + noise, dim=-1) * (8 + length)).to(self.device, dtype)


def check_bridge(load: Load, folder: Path | None = None, *, dim: int, device: torch.device | str = "cpu") -> None:
    """Check the bridge that `load(folder)` returns against every rule of `BRIDGE_RULES`.

    Random generators and torch's settings are restored.

    Args:
        load: As for BridgePlugin: returns a Bridge, or a function on features [N, D].
        folder: What `load` gets.
        dim: D, the width of the features.
        device: Where bridge and features are.

    Raises:
        ConformanceError: Some rules are broken; it lists them all.
    """
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with seeded(0):
            apply_rules("the bridge", Trial(load, folder, dim, torch.device(device)), BRIDGE_RULES, basic=BASIC)
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])


def _loading(trial: Trial) -> str | None:
    """Loading twice from one folder gives the same bridge, bit for bit, whatever the random generators' state."""
    results = []
    for seed in (1, 2):
        with seeded(seed):
            results.append(trial.apply(trial.features(9), trial.loaded()))
    return None if torch.equal(*results) else f"the second differs by up to {_distance(*results):.3g}"


def _shape(trial: Trial) -> str | None:
    """Features [N, D] become a tensor [N, D]."""
    for count in (5, 1):
        result: Any = trial.apply(trial.features(count))
        if not isinstance(result, Tensor):
            return f"a {type(result).__name__} was returned"
        if result.shape != (count, trial.dim):
            return f"{list(result.shape)} was returned for {[count, trial.dim]}"
    return None


def _device(trial: Trial) -> str | None:
    """The result is on the device of the features."""
    found, features = trial.apply(trial.features(5)).device, trial.features(5)
    return None if found == features.device else f"it is on {found} for features on {features.device}"


def _dtype(trial: Trial) -> str | None:
    """The result has the dtype of the features: float32, float64, float16, bfloat16."""
    found = {dtype: trial.apply(trial.features(5, dtype)).dtype for dtype in DTYPES}
    return ", ".join(f"{of} was returned for {dtype}" for dtype, of in found.items() if of != dtype) or None


def _finite(trial: Trial) -> str | None:
    """Finite features stay finite, in each of these dtypes."""
    wrong = [dtype for dtype in DTYPES if not trial.apply(trial.features(64, dtype)).isfinite().all()]
    return f"NaN or infinity was returned for features of {', '.join(map(str, wrong))}" if wrong else None


def _empty(trial: Trial) -> str | None:
    """No pairs, [0, D], become [0, D]."""
    result = trial.apply(trial.features(0))
    return None if result.shape == (0, trial.dim) else f"{list(result.shape)} was returned"


def _zero_rows(trial: Trial) -> str | None:
    """Features of zeros, among others and alone, stay finite."""
    among, alone = trial.features(6), torch.zeros_like(trial.features(3))
    among[2] = 0
    wrong = not all(trial.apply(x).isfinite().all() for x in (among, alone))
    return "NaN or infinity was returned" if wrong else None


def _input(trial: Trial) -> str | None:
    """The bridge does not write into its input."""
    for dtype in (torch.float32, torch.float64):
        given = trial.features(9, dtype)
        trial.apply(given)
        if not torch.equal(given, trial.features(9, dtype)):
            return f"features of {dtype} were changed; make a new tensor instead of x += … or x.add_(…)"
    return None


def _own_result(trial: Trial) -> str | None:
    """A result stays as it is when the bridge is called again."""
    result = trial.apply(trial.features(9))
    kept = result.clone()
    trial.apply(trial.features(9, seed=1))
    return None if torch.equal(result, kept) else "it was overwritten by the next; return a new tensor each time"


def _deterministic(trial: Trial) -> str | None:
    """The same features give the same result, bit for bit, whatever came between."""
    first = trial.apply(trial.features(9)).clone()
    trial.apply(trial.features(17, seed=1))
    again = trial.apply(trial.features(9))
    return None if torch.equal(first, again) else f"the second result differs by up to {_distance(first, again):.3g}"


def _random_numbers(trial: Trial) -> str | None:
    """The bridge draws no random number from torch, numpy or python, and their seed does not matter."""
    results = []
    for seed in (1, 2):
        with seeded(seed):
            before = _random_states(trial.device)
            results.append(trial.apply(trial.features(9)).clone())
            after = _random_states(trial.device)
        drawn = [name for name, state in after.items() if state != before[name]]
        if drawn:
            return f"the generator of {' and '.join(drawn)} moved"
    return None if torch.equal(*results) else "another seed gave another result"


def _gradient(trial: Trial) -> str | None:
    """The bridge tracks no gradient, and leaves torch's gradient mode as it was."""
    for tracking in (True, False):
        with torch.set_grad_enabled(tracking):
            result = trial.apply(trial.features(5))
            if torch.is_grad_enabled() != tracking:
                return "gradients are " + ("off" if tracking else "on") + " for the whole process after the call"
        if result.requires_grad:
            return "the result requires one; decorate the call with @torch.no_grad()"
    return None


def _attributes(trial: Trial) -> str | None:
    """The class attributes have the types that `Bridge` declares."""
    wrong = {
        name: getattr(trial.bridge, name) for name, fits in ATTRIBUTES.items() if not fits(getattr(trial.bridge, name))
    }
    return ", ".join(f"{name} is {value!r:.60}" for name, value in wrong.items()) or None


def _settings(trial: Trial) -> str | None:
    """`override()` without a change gives the same bridge, and refuses a setting that `settings` does not name."""
    try:
        trial.bridge.override(no_such_setting=1)
    except BridgeError:
        pass
    else:
        return "an unknown setting was accepted; raise BridgeError, as Bridge.override does"
    return _moved(trial.apply(trial.features(9)), trial.apply(trial.features(9), trial.bridge.override()))


def _pairs(trial: Trial) -> str | None:
    """Without needs_pairs = True, the result is the same whether pairs are given or not."""
    if trial.bridge.needs_pairs:
        return None
    alone: Tensor = trial.bridge(trial.features(9))
    return _moved(alone, trial.apply(trial.features(9)))


def _row_by_row(trial: Trial) -> str | None:
    """With row_by_row = True, a feature alone gives the same result as among others."""
    if not trial.takes_many_images:
        return None
    together, features = trial.apply(trial.features(9)), trial.features(9)
    return _moved(together, torch.cat([trial.apply(one.clone()) for one in features.split(1)]))


def _chunks(trial: Trial) -> str | None:
    """With row_by_row = True, 2500 features in one call give the same result as in several calls."""
    if not trial.takes_many_images:
        return None
    together, features = trial.apply(trial.features(MANY)), trial.features(MANY)
    return _moved(together, torch.cat([trial.apply(part.clone()) for part in features.split(MANY * 2 // 5)]))


def _order(trial: Trial) -> str | None:
    """Pairs in another order become the same features in that order."""
    order = torch.randperm(33, generator=torch.Generator().manual_seed(3)).to(trial.device)
    expected, pairs = trial.apply(trial.features(33))[order], trial.pairs(33)
    shuffled: Tensor = trial.bridge(trial.features(33)[order], replace(pairs, pairing=pairs.pairing[:, order]))
    return _moved(expected, shuffled)


def _memory_layout(trial: Trial) -> str | None:
    """The memory layout of the features does not matter: transposed, or every second one of a larger tensor."""
    expected, features = trial.apply(trial.features(9)), trial.features(9)
    spread = torch.stack([features, features + 1], 1).flatten(0, 1)[::2]
    return _moved(expected, trial.apply(features.T.contiguous().T)) or _moved(expected, trial.apply(spread))


def _autocast(trial: Trial) -> str | None:
    """Under torch.autocast the result is what it is without."""
    with torch.autocast(trial.device.type, dtype=torch.bfloat16):
        result = trial.apply(trial.features(9))
    return _moved(
        trial.apply(trial.features(9)), result, "; compute inside `with torch.autocast(x.device.type, enabled=False):`"
    )


def _default_dtype(trial: Trial) -> str | None:
    """The bridge neither changes torch's default dtype nor depends on it."""
    expected = trial.apply(trial.features(9))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = trial.apply(trial.features(9))
        after = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(before)
    if after != torch.float64:
        return f"it is {after} after the call"
    return _moved(expected, result, "; give new tensors the features' dtype")


def _score(trial: Trial) -> str | None:
    """The features of a ScoreBridge have the logits that its `moved_logits` chooses."""
    bridge = trial.bridge
    if not isinstance(bridge, ScoreBridge):
        return None
    x, pairs = trial.features(9, torch.float64), trial.pairs(9)
    expected = bridge.moved_logits(x, x @ bridge.matrix.T, pairs)
    return _moved(expected, trial.apply(trial.features(9)).double() @ bridge.matrix.T)


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
    """Seed all global random generators inside the block, and restore them."""
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
    "row_by_row": lambda value: isinstance(value, bool),
    "baseline": lambda value: isinstance(value, bool),
    "seeded": lambda value: isinstance(value, bool),
    "protocol": lambda value: value in PROTOCOLS,
    "needs_pairs": lambda value: isinstance(value, bool),
    "settings": lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    "grid": lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
    "provenance": lambda value: value is None or isinstance(value, dict),
    "context": lambda value: (
        isinstance(value, Mapping) and all(isinstance(tensor, Tensor) for tensor in value.values())
    ),
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
    "settings": _settings,
    "pairs": _pairs,
    "score": _score,
    "loading": _loading,
}
