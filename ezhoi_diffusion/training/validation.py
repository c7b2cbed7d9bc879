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
from ezhoi_diffusion.training.loss import Predict, denoising_loss, scored_loss

NUM_RANGES = 5
PER_RANGE = 100
PER_RANGE_SCORED = 500  # most pairs are background, and say little


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
    features: TrainingSet
    indices: Tensor

    @classmethod
    def from_features(cls, features: TrainingSet, config: TrainConfig) -> Validation:
        """Draw 500 (feature, timestep) pairs, or 2500 with labels. Few features are repeated; many are sampled."""
        rng = generator(config.seed, "validation")
        shuffled = features.validation[torch.randperm(len(features.validation), generator=rng)]
        per_range = PER_RANGE if features.labelled is None else PER_RANGE_SCORED
        count = NUM_RANGES * per_range
        indices = shuffled.repeat(-(-count // len(shuffled)))[:count]
        timesteps = (torch.arange(count) * features.num_timesteps) // count
        t = torch.cat([part[torch.randperm(len(part), generator=rng)] for part in timesteps.split(per_range)])
        noise = features.noise(indices, torch.randn(count, features.dim, generator=rng))
        schedule = Schedule.cosine(config.num_timesteps)
        return cls(
            features[indices], t, noise, schedule, config.objective, config.recipe.scale_factor, features, indices
        )

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Lowest and highest timestep of every range."""
        return [(int(part.min()), int(part.max())) for part in self.t.chunk(NUM_RANGES)]

    @torch.no_grad()
    def losses(self, predict: Predict, device: torch.device | str = "cpu") -> list[float]:
        """Return the loss of `predict` in every range. Their mean is the validation loss."""
        parts = zip(*(x.chunk(NUM_RANGES) for x in (self.z, self.t, self.noise, self.indices)), strict=True)
        return [
            float(self._loss(predict, z.to(device), t, noise.to(device), indices)) for z, t, noise, indices in parts
        ]

    def _loss(self, predict: Predict, z: Tensor, t: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        if self.features.labelled is not None:
            visual, labels = self.features.source[indices].to(z.device), self.features.labelled[indices].to(z.device)
            return scored_loss(predict, visual, labels, t, noise, self.schedule, self.features)
        return denoising_loss(
            predict, z, t, noise, self.schedule, self.objective, self.scale_factor, paired=self.features.paired
        )

    def baseline_losses(self) -> list[float]:
        """Return the losses of the isotropic estimate, which knows no data. A trained network has to be below them."""
        skip, _ = isotropic_estimate(self.schedule, self.objective, self.z.shape[1], self.scale_factor)
        return self.losses(lambda x, t: skip[t].to(x).unsqueeze(1) * x)
