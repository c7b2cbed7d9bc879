"""The validation loss: that of a fixed batch of held-out features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule, isotropic_estimate
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.loss import Predict, denoising_loss

NUM_RANGES = 5
PER_RANGE = 100


@dataclass(frozen=True, eq=False)
class Validation:
    """Held-out features with noise and timesteps that are fixed for the whole run.

    The timesteps form five ranges, from low noise to high. Each range has as many features, and evenly spread timesteps.
    """

    z: Tensor
    t: Tensor
    noise: Tensor
    schedule: Schedule
    objective: Objective
    scale_factor: float
    paired: bool

    @classmethod
    def from_features(cls, features: TrainingSet, config: TrainConfig) -> Validation:
        """Draw 500 (feature, timestep) pairs. Few features are repeated at several timesteps; many are sampled."""
        rng = generator(config.seed, "validation")
        shuffled = features.validation[torch.randperm(len(features.validation), generator=rng)]
        count = NUM_RANGES * PER_RANGE
        indices = shuffled.repeat(-(-count // len(shuffled)))[:count]
        timesteps = (torch.arange(count) * config.num_timesteps) // count
        t = torch.cat([part[torch.randperm(len(part), generator=rng)] for part in timesteps.split(PER_RANGE)])
        noise = features.noise(indices, torch.randn(count, features.dim, generator=rng))
        schedule = Schedule.cosine(config.num_timesteps)
        return cls(features[indices], t, noise, schedule, config.objective, config.recipe.scale_factor, features.paired)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Lowest and highest timestep of every range."""
        return [(int(part.min()), int(part.max())) for part in self.t.split(PER_RANGE)]

    @torch.no_grad()
    def losses(self, predict: Predict, device: torch.device | str = "cpu") -> list[float]:
        """Return the loss of `predict` in every range. Their mean is the validation loss."""
        parts = zip(*(x.split(PER_RANGE) for x in (self.z, self.t, self.noise)), strict=True)
        return [
            float(
                denoising_loss(
                    predict,
                    z.to(device),
                    t,
                    noise.to(device),
                    self.schedule,
                    self.objective,
                    self.scale_factor,
                    paired=self.paired,
                )
            )
            for z, t, noise in parts
        ]

    def baseline_losses(self) -> list[float]:
        """Return the losses of the isotropic estimate, which knows no data. A trained network has to be below them."""
        skip, _ = isotropic_estimate(self.schedule, self.objective, self.z.shape[1], self.scale_factor)
        return self.losses(lambda x, t: skip[t].to(x).unsqueeze(1) * x)
