"""Bridges that act on the score, and the baselines that they have to beat."""

from __future__ import annotations

from pathlib import Path

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.scoring import compete as _compete
from ezhoi_diffusion.scoring import interactive as _interactive
from ezhoi_diffusion.scoring import linear
from ezhoi_diffusion.scoring import pseudo as _pseudo
from ezhoi_diffusion.scoring import residual as _residual
from ezhoi_diffusion.scoring import test_time_cache as _test_time_cache
from ezhoi_diffusion.scoring.controls import PriorOnly, RandomMove, Scale


def load_prior_only(folder: Path | None) -> PriorOnly:
    """The bridge to zero, whatever the folder."""
    return PriorOnly()


def load_scale(folder: Path | None) -> Scale:
    """The scaling, whatever the folder."""
    return Scale()


def load_random_move(folder: Path | None) -> RandomMove:
    """The random move, whatever the folder."""
    return RandomMove()


eszsl = BridgePlugin(linear.ESZSL, linear.load_eszsl, linear.fit_eszsl)
gaussian_classes = BridgePlugin(linear.GAUSSIAN_CLASSES, linear.load_gaussian_classes, linear.fit_gaussian_classes)
compete = BridgePlugin(_compete.NAME, _compete.load, _compete.fit)
interactive = BridgePlugin(_interactive.NAME, _interactive.load, _interactive.fit)
pseudo = BridgePlugin(_pseudo.NAME, _pseudo.load, _pseudo.fit)
prior_only = BridgePlugin("prior_only", load_prior_only)
random_move = BridgePlugin("random_move", load_random_move)
residual = BridgePlugin(_residual.NAME, _residual.load, _residual.fit)
scale = BridgePlugin("scale", load_scale)
test_time_cache = BridgePlugin(_test_time_cache.NAME, _test_time_cache.load, _test_time_cache.fit)
