"""Baselines that move scores without knowing anything: a gain of another bridge counts over the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.scoring.bridge import checked_number

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

FREQUENCY = 20.0
GRID = {"factor": (1.5, 2.0, 4.0)}


class PriorOnly(Bridge):
    """x -> 0. All logits become equal, and the detector's scores alone rank the pairs."""

    row_by_row = True
    baseline = True

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Zeros for features [P, D]."""
        return torch.zeros_like(adapter_feat)


class Scale(Bridge):
    """x -> factor · x. EZ-HOI's score is sigmoid(logit) times the detector's scores, so it weighs the logit more."""

    row_by_row = True
    baseline = True
    settings = ("factor",)
    grid = GRID

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over a factor of at least 0. Raises BridgeError for another value."""
        self.factor = checked_number("scale", settings, "factor", self.factor)

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Scale features [P, D]."""
        return (adapter_feat.float() * self.factor).to(adapter_feat.dtype)


class RandomMove(Bridge):
    """x -> x + size · |x| · unit(sin(20 · G · unit(x))) with a fixed Gaussian matrix G [D, D].

    The direction is a function of x alone, and as good as random: features whose directions are a tenth of their norm apart
    have unrelated ones. A rounding error moves it no more than 20 times its own size.
    """

    row_by_row = True
    baseline = True
    settings = ("size",)

    def __init__(self, size: float = 0.3) -> None:
        super().__init__()
        self.size = size
        self._mixers: dict[tuple[int, torch.device], Tensor] = {}

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over a size of at least 0. Raises BridgeError for another value."""
        self.size = checked_number("random_move", settings, "size", self.size)

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Move features [P, D]."""
        with torch.autocast(adapter_feat.device.type, enabled=False):
            x = adapter_feat.double()
            direction = normalize((FREQUENCY * normalize(x, dim=1) @ self._mixer(x)).sin(), dim=1)
            moved: Tensor = x + self.size * x.norm(dim=1, keepdim=True) * direction
            return moved.to(adapter_feat.dtype)

    def _mixer(self, x: Tensor) -> Tensor:
        key = (x.shape[1], x.device)
        if key not in self._mixers:
            draw = generator(0, "random move", x.shape[1])
            self._mixers[key] = torch.randn(x.shape[1], x.shape[1], generator=draw, dtype=torch.float64).to(x.device)
        return self._mixers[key]
