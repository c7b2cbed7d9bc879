"""The interface of a denoiser.

A denoiser is a module `forward(x [N, D], t [N] or [1] int64) -> [N, D]` that returns the raw prediction of its objective.
Every x has the norm `scale_factor`, so a denoiser sees a direction and a timestep. In training each x has its own timestep. A
sampler passes one for all, t [1], and what depends on t alone is computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError

DenoiserBuilder = Callable[..., nn.Module]
"""(dim, schedule, objective, scale_factor, **denoiser_options) -> a freshly initialised denoiser on the CPU."""


class DenoiserError(EzhoiDiffusionError):
    """A denoiser cannot be built here, or not with these options."""


class FittedDenoiser(nn.Module, ABC):
    """A denoiser that is fitted to data in one call instead of trained.

    `ezhoi_diffusion.training.trainer.train` fits any denoiser that derives from it. Its state_dict holds what it learned.
    """

    memorizes: bool = False
    """It returns only what it was fitted to. Then it needs a recipe that learns from text, and a loss on held-out features
    says nothing about it."""

    @abstractmethod
    def fit(self, z: Tensor) -> None:
        """Fit to centred features z [N, D] of norm `scale_factor`. Raises DenoiserError for too few or too many."""

    def fitted_options(self) -> dict[str, Any]:
        """Return the options that build a denoiser with the shape of this fitted one; {} where the data do not set it."""
        return {}
