"""One dataclass is the configuration, its JSON and the command line's flags."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ezhoi_diffusion.diffusion.artifact import MAX_TIMESTEPS, BridgeConfig
from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE, Recipe, recipe_of
from ezhoi_diffusion.diffusion.schedule import OBJECTIVES, Objective
from ezhoi_diffusion.errors import EzhoiDiffusionError

MixedPrecision = Literal["no", "fp16", "bf16"]
LrSchedule = Literal["constant", "cosine", "linear"]


class TrainingError(EzhoiDiffusionError):
    """A training cannot be started, continued or brought to a good end."""


@dataclass(frozen=True)
class TrainConfig:
    """How a bridge is trained; the defaults fit the denoiser mlp. Raises TrainingError for values out of range.

    The paper's own run is recipe "paper", denoiser "unet1d", train_steps 3,000,000, learning_rate 8e-5 and mixed_precision
    "fp16".
    """

    # Under a minute on one CPU core (20-30 ms a step). The bridge is that of the lowest validation loss, so more steps than
    # are needed cost time and nothing else. On sentence embeddings of HICO-DET's interactions (D = 384, a tenth held
    # out) the validation loss fell below that of the closed-form Gaussian after 800 steps for 212 texts (.135; the isotropic
    # bar .199) and after 1150 for 600 (.119), and was lowest at 1000 steps for 212 (.132), below .10 at 2000 for 600. At the
    # 8e-5 of the reference, made for its UNet, 212 texts were learned by heart from step 2000 on (.138) without getting there.
    train_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=64, metadata={"help": "rows per step, over all processes together"})
    learning_rate: float = field(default=3e-4, metadata={"help": "Adam's learning rate, the highest of the run"})
    lr_schedule: LrSchedule = field(
        default="constant", metadata={"help": "learning rate after the warm-up: cosine and linear fall to 0 at the end"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps over which the learning rate rises from 0"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, decoupled; 0 is Adam"})
    ema_decay: float = field(default=0.995, metadata={"help": "decay of the averaged weights, which are the result"})
    ema_update_every: int = field(
        default=1, metadata={"help": "steps between updates of the averaged weights; Diffusion Bridge's trainer has 10"}
    )
    timesteps: int = field(default=1000, metadata={"help": "levels of the noise schedule"})
    objective: Objective = field(default="pred_x0", metadata={"help": "what the network predicts"})
    gradient_accumulate: int = field(default=1, metadata={"help": "batches per optimizer step"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: MixedPrecision = field(
        default="no", metadata={"help": "precision of forward and backward; fp16 needs a GPU"}
    )
    val_fraction: float = field(
        default=0.1, metadata={"help": "share of text rows, or of images, that is kept for validation"}
    )
    checkpoint_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    val_every: int = field(default=100, metadata={"help": "steps between validations"})
    patience: int = field(
        default=0, metadata={"help": "stop after so many validations without a new lowest validation loss; 0: never"}
    )
    seed: int = field(default=0, metadata={"help": "of initial weights, data order, noise and split"})
    recipe: Recipe = field(
        default=DEFAULT_RECIPE, metadata={"help": "what is trained on, and how the bridge is applied later"}
    )
    denoiser: str = field(
        default="mlp",
        metadata={
            "help": "network, by name: mlp, unet1d, gaussian or empirical (closed forms, which need no training), or one that a plugin brings"
        },
    )
    denoiser_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'options of the network as JSON, e.g. {"width": 1024}'}
    )

    def __post_init__(self) -> None:
        counts = (
            "train_steps",
            "batch_size",
            "gradient_accumulate",
            "checkpoint_every",
            "val_every",
            "ema_update_every",
        )
        for name in counts:
            self._require(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "at least 1")
        self._require(
            "ema_update_every", self.ema_update_every <= self.train_steps, f"at most train_steps, {self.train_steps}"
        )
        self._require("denoiser_options", _is_json_object(self.denoiser_options), "a JSON object")
        self._require("patience", type(self.patience) is int and self.patience >= 0, "at least 1, or 0 for never")
        self._require(
            "warmup_steps",
            type(self.warmup_steps) is int and 0 <= self.warmup_steps < self.train_steps,
            f"from 0 to below train_steps, {self.train_steps}",
        )
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or positive, and finite")
        schedules = get_args(LrSchedule)
        self._require("lr_schedule", self.lr_schedule in schedules, f"one of {', '.join(schedules)}")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1")
        self._require("val_fraction", 0 < self.val_fraction < 1, "between 0 and 1")
        self._require("seed", type(self.seed) is int, "a whole number")
        self._require(
            "timesteps",
            type(self.timesteps) is int and self.recipe.start_timestep <= self.timesteps <= MAX_TIMESTEPS,
            f"from the recipe's start_timestep, {self.recipe.start_timestep}, to {MAX_TIMESTEPS}",
        )
        self._require("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        self._require(
            "objective",
            self.recipe.trained_on != "pairs" or self.objective == "pred_x0",
            "pred_x0 for a recipe of pairs",
        )
        precisions = get_args(MixedPrecision)
        self._require("mixed_precision", self.mixed_precision in precisions, f"one of {', '.join(precisions)}")

    def bridge_config(self, dim: int) -> BridgeConfig:
        """That of the bridge which is trained so on rows of width D, without provenance."""
        return BridgeConfig(
            dim=dim,
            recipe=self.recipe,
            denoiser=self.denoiser,
            denoiser_options=self.denoiser_options,
            objective=self.objective,
            timesteps=self.timesteps,
        )

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise TrainingError(f"{name} must be {what}, not {getattr(self, name)!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * self.learning_rate_share(step)

    def learning_rate_share(self, step: int) -> float:
        """The same as a share of the highest: (step+1)/W in a warm-up of W steps, then 1, 1−p or (1 + cos πp)/2.

        p is the share of the other steps that is done. A function of the step alone, so a resumed run needs no more.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (self.train_steps - self.warmup_steps))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
            self.lr_schedule
        ]

    def departures(self, then: dict[str, Any]) -> list[str]:
        """What keeps this from being the same run as the one begun with `then`, each in words.

        How long a run lasts may change, as long as that changes none of its steps. Fields that `then` lacks had
        their defaults.
        """
        free = {"patience"} if self.lr_schedule != "constant" else {"patience", "train_steps"}
        begun, now = {**TrainConfig().to_dict(), **then}, self.to_dict()
        begun["recipe"] = asdict(recipe_of(begun["recipe"]))
        return [
            f"{name} (was {begun[name]!r}, is {now[name]!r})"
            for name in now
            if name not in free and now[name] != begun[name]
        ]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's own types: what a tuple was is a list, here as in a file."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises TrainingError for unknown fields."""
        try:
            values = dict(content)
            if "recipe" in values:
                values["recipe"] = recipe_of(values["recipe"])
            return cls(**values)
        except (AttributeError, TypeError) as error:
            raise TrainingError(f"not a training configuration: {error}") from error


def _is_json_object(value: object) -> bool:
    try:
        json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        return False
    return isinstance(value, dict)
