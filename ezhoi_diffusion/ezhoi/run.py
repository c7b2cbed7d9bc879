"""One EZ-HOI run, as the package and its plugins see it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ezhoi_diffusion.bridge import Bridge, fingerprint_mismatch
from ezhoi_diffusion.errors import EzhoiDiffusionError, printable
from ezhoi_diffusion.ezhoi import fingerprint as fp
from ezhoi_diffusion.ezhoi.feature_tap import HookPoint
from ezhoi_diffusion.features.fingerprint import Fingerprint
from ezhoi_diffusion.plugins import PluginManager


class FingerprintError(EzhoiDiffusionError):
    """A bridge was made for another EZ-HOI run than this one."""


@dataclass
class EzHoiRun:
    """One EZ-HOI run; the argument `run` of `on_attach` and `on_detach`."""

    model: Any
    """The detector, unwrapped."""
    args: argparse.Namespace
    """EZ-HOI's parsed flags, with ours."""
    engine: Any
    """EZ-HOI's engine; None in a script for one image."""
    plugins: PluginManager
    hook_point: HookPoint
    """The module whose output is adapter_feat."""
    failed: bool = False
    """The run ended with an error; set before `on_detach`."""
    finished: bool = False
    """A plugin sets it in `on_attach` where nothing is left to do; the run then ends with status 0."""
    images_done: dict[str, int] = field(default_factory=dict)
    """Plugin -> number of images that it has from an earlier capture. The pass starts at the smallest."""
    forced: list[str] = field(default_factory=list)
    """Fingerprint mismatches that --force let through, for the report."""
    applied_settings: set[str] = field(default_factory=set)
    """Settings of --set and --inference-steps that an enabled bridge has."""
    _checked_a_bridge: bool = field(default=False, repr=False)

    @property
    def rank(self) -> int:
        """Index of this process, 0 to `world_size` - 1."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of EZ-HOI's processes."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint that a bridge must have to be valid in this run."""
        return fp.fingerprint(self.model, self.args)

    def check_fingerprint(self, bridge: Bridge, name: str) -> None:
        """Refuse a bridge that was made for another run; --force lets it pass, and the report says so.

        `--restore-context` first copies the context vectors of the bridge into the model. Only the first bridge may do
        that, because all variants of a comparison are scored in one pass.

        Args:
            bridge: Checked by `provenance["fingerprint"]`; one without provenance fits every run.
            name: Its name in messages.

        Raises:
            FingerprintError: Something differs; the message has both values.
        """
        if bridge.provenance is None:
            return
        is_first, self._checked_a_bridge = not self._checked_a_bridge, True
        mismatch = fingerprint_mismatch(bridge, name, self.fingerprint.to_dict())
        if mismatch and "context" in mismatch.fields and self.args.restore_context and is_first:
            try:
                fp.restore_context(self.model, bridge.context)
            except ValueError as error:
                raise FingerprintError(
                    f"--restore-context cannot use the vectors of bridge '{name}': {error}"
                ) from error
            del self.fingerprint
            mismatch = fingerprint_mismatch(bridge, name, self.fingerprint.to_dict())
        if mismatch is None:
            return
        if self.args.force:
            self.forced.append(mismatch.message)
            if self.rank == 0:
                print(f"FORCED: {printable(mismatch.message)}", flush=True)
            return
        if mismatch.fields != {"context"}:
            raise FingerprintError(
                f"{mismatch.message}. Capture and train for this run, or add --force to use the bridge anyway"
            )
        if self.engine is None:
            raise FingerprintError(
                f"{mismatch.message}. EZ-HOI does not save its context vectors, and a script for one image draws new ones "
                f"every time, whatever its --seed: add --restore-context to use the vectors stored with the bridge"
            )
        raise FingerprintError(
            f"{mismatch.message}. EZ-HOI does not save its context vectors, and another seed or script draws others: use "
            f"the seed of the capture, or add --restore-context to use the vectors stored with the bridge"
        )
