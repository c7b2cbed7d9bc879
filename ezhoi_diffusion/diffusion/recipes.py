"""Recipes: which rows a bridge learns from, which means it uses, and how strongly it is applied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ezhoi_diffusion.errors import EzhoiDiffusionError

Side = Literal["visual", "text"]
Source = Literal["visual", "text", "pairs"]
Output = Literal["keep_norm", "unit_norm"]
NoisyNorm = Literal["expected", "scale_factor"]
Spacing = Literal["linear", "quadratic", "cubic", "published"]


class RecipeError(EzhoiDiffusionError, ValueError):
    """A recipe's field has a value that cannot be meant."""


@dataclass(frozen=True)
class Recipe:
    """Everything that changes what a bridge does to a visual feature, apart from its weights.

    `start_timestep` (t0) is how strongly a feature is bridged, `steps` (S, NFE) how many network evaluations that
    takes. Raises RecipeError for values out of range; vary one with dataclasses.replace.
    """

    name: str
    trained_on: Source
    """The rows it learns from. Text rows lose the text mean, visual rows lose `input_mean`. pairs: the text of a visual
    row's own class, from mixtures of both: level 0 is the text, the last level the visual row, instead of noise."""
    input_mean: Side
    """The mean that a visual feature loses at inference."""
    restored_mean: Side
    """The mean that output "keep_norm" gives back."""
    start_timestep: int
    num_steps: int
    blend: float
    """λ of direction = unit((1−λ)·input + λ·bridged), both unit and centred."""
    output: Output
    """calibrated: mean and the row's own norm are given back. unit: the centred unit direction as it is."""
    scale_factor: float = 5.0
    """s, the norm of every network input."""
    sampler: str = "ddim"
    spacing: Spacing = "linear"
    """How the levels of the evaluations are spaced, see `ezhoi_diffusion.diffusion.samplers.levels_of`."""
    noisy_norm: NoisyNorm = "expected"
    """The norm that x_t counts with where a predicted ε or v leads back to x0: that which x_t has at its level, or, as in
    the published code, that of the network's input. Without meaning for pred_x0."""
    noise_augmentation: float = 0.0
    """Norm of the Gaussian noise that is added to the visual row of a pair in training, as a share of the row's own."""

    def __post_init__(self) -> None:
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise RecipeError(
                    f"recipe {self.name!r}: {field} must be one of {', '.join(known)}, not {getattr(self, field)!r}"
                )
        for field in ("num_steps", "start_timestep"):
            if type(getattr(self, field)) is not int:
                raise RecipeError(f"recipe {self.name!r}: {field} must be a whole number")
        if not 1 <= self.num_steps <= self.start_timestep:
            raise RecipeError(
                f"recipe {self.name!r}: need 1 <= num_steps <= start_timestep (more steps would repeat levels), "
                f"not num_steps={self.num_steps}, start_timestep={self.start_timestep}"
            )
        if not 0 <= self.blend <= 1:
            raise RecipeError(f"recipe {self.name!r}: blend must lie between 0 and 1, not {self.blend}")
        if not 0 < self.scale_factor < math.inf:
            raise RecipeError(
                f"recipe {self.name!r}: scale_factor must be positive and finite, not {self.scale_factor}"
            )
        if not 0 <= self.noise_augmentation < math.inf:
            raise RecipeError(
                f"recipe {self.name!r}: noise_augmentation must be 0 or positive, and finite, not {self.noise_augmentation}"
            )


def recipe_of(content: dict[str, Any]) -> Recipe:
    """The inverse of dataclasses.asdict; files from before recipes had a grid mean that of their sampler.

    Raises RecipeError and TypeError for what is no recipe.
    """
    spacing = "published" if content.get("sampler") == "published" else "linear"
    return Recipe(**{"spacing": spacing, **content})


_CHOICES: dict[str, tuple[str, ...]] = {
    "trained_on": get_args(Source),
    "input_mean": get_args(Side),
    "restored_mean": get_args(Side),
    "output": get_args(Output),
    "noisy_norm": get_args(NoisyNorm),
    "spacing": get_args(Spacing),
}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # Diffusion Bridge (CVPR 2025), each side less its own mean. The host's text features keep theirs, and its score
        # is an un-normalised dot product that was trained with the shared part of both in place: so the visual mean
        # and the row's norm are given back. With the text mean instead, every variant lost three quarters of the
        # demo world's mAP (48 -> 13, as the plain mean shift does), though it had helped where scores are cosines.
        Recipe("paper", "text", "visual", "visual", start_timestep=600, num_steps=5, blend=1.0, output="keep_norm"),
        # The training guide as written. It hurt in every world measured: kept to reproduce it.
        Recipe(
            "guide",
            "visual",
            "text",
            "text",
            start_timestep=600,
            num_steps=600,
            blend=1.0,
            output="unit_norm",
            sampler="published",
            spacing="published",
            noisy_norm="scale_factor",
        ),
        # Learns from labels of seen classes: a mixture of a visual row and the text of its own class, from which DDIM, with
        # the visual row in the place of the noise, leads from the one to the other (cold diffusion, Bansal et al. 2022).
        # Maps from pairs helped where scores are cosines; in the demo's world, where background pairs are moved towards
        # class texts too, mAP fell with the strength: 48.0 -> 47.7 at .05, 46.6 at .1, 41.5 at .3, 27.3 at 1.
        Recipe(
            "paired",
            "pairs",
            "visual",
            "visual",
            start_timestep=1000,
            num_steps=5,
            blend=0.05,
            output="keep_norm",
            noise_augmentation=0.5,
        ),
        # The default: the gentlest of what was measured. Starting low keeps a row's identity, which 600 washes out, and
        # blending keeps most of its direction. In the demo world it left mAP where it was (48.0 -> 48.2) while
        # strength 1 from 100 lost 3 points and from 600 lost 17.
        Recipe("gentle", "text", "visual", "visual", start_timestep=100, num_steps=5, blend=0.3, output="keep_norm"),
    )
}
DEFAULT_RECIPE = RECIPES["gentle"]
