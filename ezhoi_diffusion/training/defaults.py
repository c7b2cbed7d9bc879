"""Recipe and configuration of a training from what a user gave, with defaults that fit the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE, RECIPES, Recipe
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.training.config import TrainConfig

# TrainConfig's defaults fit a few hundred texts and the mlp. Visual features are many, and unet1d has its published rate.
FOR_VISUAL = {"train_steps": 5000, "val_every": 500, "checkpoint_every": 1000, "learning_rate": 8e-5}
FOR_PAIRS = {**FOR_VISUAL, "patience": 5}
# The score overfits soon: on the demo's features the validation loss is lowest after some 100 steps.
FOR_SCORE: dict[str, Any] = {
    "train_steps": 600,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "val_every": 20,
    "checkpoint_every": 100,
    "patience": 5,
}
MLP_FOR_SCORE = {"width": 256, "depth": 1}
FOR_UNET = {"learning_rate": 8e-5}
RECIPE_SETTINGS = [field.name for field in fields(Recipe) if field.name not in ("name", "trained_on")]


def choose_recipe(name: str | None, settings: Mapping[str, Any]) -> Recipe:
    """The recipe `name`, by default "gentle", with these settings.

    Raises:
        EzhoiDiffusionError: There is no such recipe or setting.
        RecipeError: A value is out of range.
    """
    if name is not None and name not in RECIPES:
        raise EzhoiDiffusionError(f"there is no recipe '{name}'; recipes are {', '.join(RECIPES)}")
    if unknown := sorted(settings.keys() - set(RECIPE_SETTINGS)):
        raise EzhoiDiffusionError(
            f"a recipe has no setting {', '.join(unknown)}; its settings are {', '.join(RECIPE_SETTINGS)}"
        )
    return replace(RECIPES[name] if name else DEFAULT_RECIPE, **settings)


def choose_config(recipe: Recipe, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a training: what was given, and for the rest defaults that fit recipe and denoiser.

    Raises:
        TrainingError: A value is out of range.
    """
    defaults: dict[str, Any] = {"text": {}, "visual": FOR_VISUAL, "pairs": FOR_PAIRS, "score": FOR_SCORE}[
        recipe.trained_on
    ]
    denoiser = given.get("denoiser", "mlp")
    fitting: dict[str, Any] = FOR_UNET if denoiser == "unet1d" else {}
    if recipe.trained_on == "score" and denoiser == "mlp":
        fitting = {"denoiser_options": MLP_FOR_SCORE}
    return TrainConfig(**{"recipe": recipe, **defaults, **fitting, **given})
