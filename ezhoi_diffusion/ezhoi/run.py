"""One EZ-HOI run, as the package and its plugins see it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ezhoi_diffusion.bridge import Bridge, fingerprint_mismatch
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi import fingerprint as fp
from ezhoi_diffusion.ezhoi.feature_tap import HookPoint
from ezhoi_diffusion.plugins import PluginManager


class FingerprintError(EzhoiDiffusionError):
    """A bridge was made for another host than this one."""


@dataclass
class EzHoiRun:
    """One EZ-HOI run, as plugins see it.

    model: the detector, unwrapped. args: the host's parsed flags, ours among them. engine: the host's engine, None
    under inference.py.
    """

    model: Any
    args: argparse.Namespace
    engine: Any
    plugins: PluginManager
    tap_point: HookPoint
    failed: bool = False
    done: dict[str, int] = field(default_factory=dict)
    forced: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This process among `world_size`."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of the host's processes."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @cached_property
    def fingerprint(self) -> fp.Fingerprint:
        """What has to be equal for a bridge to be valid here."""
        return fp.fingerprint(self.model, self.args)

    def check_fingerprint(self, bridge: Bridge, name: str) -> None:
        """Hold a bridge's fingerprint against this host's.

        A bridge that knows where it comes from has `provenance["fingerprint"]`, and `context`, the context vectors it
        was captured with; `--restore-context` puts those into the model. Raises FingerprintError with both values where
        something differs, unless `--force-bridge`, which every report of the run then says.
        """
        provenance = bridge.provenance
        if provenance is None:
            return
        first = not self.provenance  # only the first may change the host: the others are scored on the same pass
        self.provenance[name] = provenance
        found = provenance.get("fingerprint")
        stored = found if isinstance(found, dict) else {}
        if self.args.restore_context and first and stored.get("context") != self.fingerprint.context:
            try:
                fp.restore_context(self.model, dict(bridge.context))
            except ValueError as error:
                raise FingerprintError(f"--restore-context cannot be done for bridge '{name}': {error}") from error
            del self.fingerprint
        mismatch = fingerprint_mismatch(bridge, name, self.fingerprint.to_dict())
        if mismatch is None:
            return
        fields, message = mismatch.fields, mismatch.message
        if self.args.force_bridge:
            self.forced.append(message)
            if self.rank == 0:
                print(f"FORCED: {message}", flush=True)
            return
        if fields == {"context"} and self.engine is None:
            raise FingerprintError(
                f"{message}. The host never saves its context vectors, and a script for one image draws others every time, "
                f"whatever its --seed: add --restore-context to use the vectors stored with the bridge"
            )
        if fields == {"context"}:
            raise FingerprintError(
                f"{message}. The host never saves its context vectors, so another seed or script draws others: run with "
                f"the seed of the capture, or add --restore-context to use the vectors stored with the bridge"
            )
        raise FingerprintError(
            f"{message}. Capture and train for this host, or add --force-bridge to use it all the same"
        )
