"""Bridges that act on the score, and the baselines that they have to beat.

Their modules are imported when a bridge or a fit is looked up, so that a list of plugins takes no torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin

if TYPE_CHECKING:
    from ezhoi_diffusion.builtin.bridge_plugin import Fit, Load
    from ezhoi_diffusion.scoring.controls import PriorOnly, RandomMove, Scale


class _Scoring(BridgePlugin):
    """A bridge of a module in `ezhoi_diffusion.scoring`, which has its `load` and `fit` under these names."""

    def __init__(self, name: str, module: str = "", load: str = "load", fit: str = "fit") -> None:
        self.name, self._bridge = name, None
        self._module, self._load, self._fit = module or name, load, fit

    def _imported(self, name: str) -> Any:
        return getattr(import_module(f"ezhoi_diffusion.scoring.{self._module}"), name)

    @property
    def load(self) -> Load:  # type: ignore[override]
        """Loads the bridge in a folder."""
        loaded: Load = self._imported(self._load)
        return loaded

    @property
    def fit(self) -> Fit:  # type: ignore[override]
        """Fits the bridge to features."""
        fitted: Fit = self._imported(self._fit)
        return fitted


def load_prior_only(folder: Path | None) -> PriorOnly:
    """The bridge to zero, whatever the folder."""
    from ezhoi_diffusion.scoring.controls import PriorOnly

    return PriorOnly()


def load_scale(folder: Path | None) -> Scale:
    """The scaling, whatever the folder."""
    from ezhoi_diffusion.scoring.controls import Scale

    return Scale()


def load_random_move(folder: Path | None) -> RandomMove:
    """The random move, whatever the folder."""
    from ezhoi_diffusion.scoring.controls import RandomMove

    return RandomMove()


eszsl = _Scoring("eszsl", "linear", "load_eszsl", "fit_eszsl")
gaussian_classes = _Scoring("gaussian_classes", "linear", "load_gaussian_classes", "fit_gaussian_classes")
compete = _Scoring("compete")
interactive = _Scoring("interactive")
pseudo = _Scoring("pseudo")
prior_only = BridgePlugin("prior_only", load_prior_only)
random_move = BridgePlugin("random_move", load_random_move)
residual = _Scoring("residual")
scale = BridgePlugin("scale", load_scale)
test_time_cache = _Scoring("test_time_cache")
