"""The base class of bridges: pair features in, pair features out, and attributes that describe the bridge."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.schema import all_finite

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs


PROTOCOLS = {  # from the strictest on
    "inductive": "nothing of unseen classes but their texts",
    "train-transductive": "unlabelled training images, in search of unseen classes",
    "test-transductive": "unlabelled test images",
}


class BridgeError(EzhoiDiffusionError):
    """A bridge cannot be built, stored or read, or was given something that it cannot take."""


class Bridge(nn.Module, ABC):
    """Maps pair features [P, D] to pair features [P, D], and nothing else.

    Derive from it, implement `forward`, and set the class attributes that apply. A bridge is deterministic, computes in
    float32, draws no random number and tracks no gradient; it returns the dtype and the device of its input, and never
    writes into it. `ezhoi_diffusion.testing.check_bridge` checks all of that.
    """

    row_by_row: bool = False
    """No row depends on the others, so features of many images may come in one call. It is checked."""
    baseline: bool = False
    """There to be beaten, as `identity` and `mean_shift` are: a gain counts over every baseline."""
    seeded: bool = False
    """A training with another seed gives another bridge: DIR may hold `seed-0/`, `seed-1/`, …"""
    needs_pairs: bool = False
    """`forward` uses `pairs` (boxes, detector scores, object classes); it is then called image by image."""
    protocol: str = "inductive"
    """What it learned from, besides labels of seen classes: one of `PROTOCOLS`."""
    settings: tuple[str, ...] = ()
    """Names that `override` and `sweep` take."""
    grid: Mapping[str, Sequence[Any]] = {}
    """Values of settings that `ezhoi-diffusion tune` tries, from the smallest change to the largest."""
    provenance: dict[str, Any] | None = None
    """Where it comes from, as JSON. With `fingerprint`, runs with another fingerprint refuse it; None fits every run."""
    context: Mapping[str, Tensor] = {}
    """EZ-HOI's context vectors at capture, which `--restore-context` puts back."""

    @abstractmethod
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Bridge the features of one image, or of many where `row_by_row`.

        Args:
            adapter_feat: Pair features [P, D]; P may be 0.
            pairs: The image's pairs. Always given where `needs_pairs`, otherwise perhaps None.

        Returns:
            [P, D], of the dtype and on the device of `adapter_feat`.
        """

    def override(self, **settings: Any) -> Self:
        """The same bridge, applied in another way. Its provenance, if any, records the change under `overridden`.

        Args:
            settings: New values for some of `self.settings`.

        Raises:
            BridgeError: A name is not in `self.settings`, or a value is refused.
        """
        unknown = sorted(set(settings) - set(self.settings))
        if unknown:
            raise BridgeError(
                f"{', '.join(unknown)} cannot be set on this bridge; its settings are {', '.join(self.settings) or 'none'}"
            )
        other = copy.copy(self)
        other.apply_settings(settings)
        known = self.provenance
        if settings and known is not None:  # a bridge that fits every run still does
            other.provenance = {**known, "overridden": {**known.get("overridden", {}), **settings}}
        return other

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over checked values on a fresh copy of the bridge; by default as attributes of the same names.

        Raises:
            BridgeError: A value is refused.
        """
        for name, value in settings.items():
            setattr(self, name, value)

    def sweep(self, points: Sequence[Mapping[str, Any]]) -> list[Self]:
        """One `override` for each point, in order. Raises what `override` raises."""
        return [self.override(**point) for point in points]


class FunctionBridge(Bridge):
    """A plain function on pair features as a bridge."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Apply the function to [P, D]."""
        return self.function(adapter_feat)


def as_bridge(value: object) -> Bridge:
    """`value` itself where it is a Bridge, a FunctionBridge around it where it can be called.

    Raises:
        BridgeError: It is neither, or a class instead of an instance.
    """
    if isinstance(value, Bridge):
        return value
    if isinstance(value, type) or not callable(value):
        forgot = ": forgot the ()?" if isinstance(value, type) else ""
        raise BridgeError(f"{value!r:.100} is no bridge: return a Bridge, or a function on features [P, D]{forgot}")
    return FunctionBridge(value)


def replacement_problem(before: Tensor, after: object) -> str | None:
    """The problem with `after` as a replacement of the pair features `before` [P, D], or None."""
    if type(after) is not Tensor:  # a subclass may compute anything from then on
        return f"returned {type(after).__name__}, not a plain tensor"
    if after.layout != torch.strided or after.is_nested:
        return f"returned a {'nested' if after.is_nested else after.layout} tensor, not a dense one"
    for what in ("shape", "dtype", "device"):
        if getattr(before, what) != getattr(after, what):
            return f"returned {what} {getattr(after, what)} for {what} {getattr(before, what)}"
    if not all_finite(after):
        return f"returned {int((~torch.isfinite(after)).sum())} values that are not finite"
    return None


# -- fingerprints ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FingerprintMismatch:
    """In which fields the fingerprint of a bridge differs from that of a run, and a sentence with both values."""

    fields: frozenset[str]
    message: str


def fingerprint_mismatch(bridge: Bridge, name: str, here: Mapping[str, Any]) -> FingerprintMismatch | None:
    """Compare a bridge's fingerprint with the fingerprint `here`, as JSON.

    Returns:
        None where nothing differs, or where the bridge has no provenance and fits every run.
    """
    if bridge.provenance is None:
        return None
    found = bridge.provenance.get("fingerprint")
    there = found if isinstance(found, dict) else {}
    differing = fingerprint_differences(here, there)
    if not differing:
        return None
    known = _flat(there)
    listed = "; ".join(
        f"{key} is {own!r} here, {repr(other) if key in known else 'unknown'} there"
        for key, (own, other) in differing.items()
    )
    return FingerprintMismatch(frozenset(differing), f"bridge '{name}' was made for another EZ-HOI run: {listed}")


def fingerprint_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field or option of a fingerprint as JSON -> (value here, value there), where they differ."""
    own, other = _flat(here), _flat(there)
    return {key: (own[key], other.get(key)) for key in own if own[key] != other.get(key)}


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    options = fingerprint.get("options")
    named = {key: value for key, value in fingerprint.items() if key != "options"}
    return named | (options if isinstance(options, dict) else {})
