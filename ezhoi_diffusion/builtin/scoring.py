"""Bridges that act on the score, and the baselines that they have to beat."""

from __future__ import annotations

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.scoring import residual as _residual

residual = BridgePlugin(_residual.NAME, _residual.load, _residual.fit)
