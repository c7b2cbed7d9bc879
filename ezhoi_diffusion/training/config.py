"""The configuration of a training: one dataclass is its JSON and the flags of the command line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE, MAX_TIMESTEPS, OBJECTIVES, Objective, Recipe
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.diffusion.artifact import BridgeConfig

MAX_STEPS = 10**8  # years of training; a file may say anything
MixedPrecision = Literal["no", "fp16", "bf16"]
LrSchedule = Literal["constant", "cosine", "linear"]


class TrainingError(EzhoiDiffusionError):
    """A training cannot be started, continued or finished."""


@dataclass(frozen=True)
class TrainConfig:
    """How a bridge is trained; the defaults fit the denoiser mlp. Raises TrainingError for values out of range.

    The paper's own run is recipe "paper", denoiser "unet1d", train_steps 3,000,000, learning_rate 8e-5 and mixed_precision
    "fp16".
    """

    # 2000 steps take under a minute on one CPU core. More cost time only: the step of the lowest validation loss counts. On
    # sentence embeddings of HICO-DET's interactions (D = 384, a tenth held out) the validation loss fell below that of the
    # closed-form Gaussian (.135) after 800 steps for 212 texts, and after 1150 for 600 (.119). It was lowest at 1000 steps for
    # 212 (.132), and below .10 at 2000 for 600. With the UNet's learning rate of 8e-5, 212 texts were memorised first.
    train_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=64, metadata={"help": "features per step, over all processes together"})
    learning_rate: float = field(default=3e-4, metadata={"help": "highest learning rate of AdamW"})
    lr_schedule: LrSchedule = field(
        default="constant", metadata={"help": "learning rate after the warm-up; cosine and linear fall to 0 at the end"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps over which the learning rate rises from 0"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay of AdamW; 0 is Adam"})
    ema_decay: float = field(default=0.995, metadata={"help": "decay of the averaged weights, which become the bridge"})
    ema_update_every: int = field(
        default=1, metadata={"help": "steps between updates of the averaged weights; 10 in Diffusion Bridge's trainer"}
    )
    num_timesteps: int = field(default=1000, metadata={"help": "T, the timesteps of the noise schedule"})
    objective: Objective = field(default="pred_x0", metadata={"help": "what the network predicts"})
    gradient_accumulate: int = field(default=1, metadata={"help": "batches per optimizer step"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: MixedPrecision = field(
        default="no", metadata={"help": "precision of forward and backward; fp16 needs a GPU"}
    )
    val_fraction: float = field(
        default=0.1, metadata={"help": "share of texts, or of images, held out to find the best step"}
    )
    checkpoint_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    val_every: int = field(default=100, metadata={"help": "steps between validations"})
    patience: int = field(
        default=0, metadata={"help": "stop after this many validations without a new lowest loss; 0: never"}
    )
    seed: int = field(default=0, metadata={"help": "seed of initial weights, data order, noise and split"})
    recipe: Recipe = field(default=DEFAULT_RECIPE, metadata={"help": "what is learned, and how the bridge is applied"})
    denoiser: str = field(
        default="mlp",
        metadata={"help": "mlp, unet1d, gaussian or empirical (both fitted in closed form), or a plugin's"},
    )
    denoiser_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'options of the denoiser as JSON, e.g. {"width": 1024}'}
    )

    def __post_init__(self) -> None:
        for name in (
            "train_steps", "batch_size", "gradient_accumulate", "checkpoint_every", "val_every", "ema_update_every",
        ):  # fmt: skip
            value = getattr(self, name)
            self._require(name, _is_int_from(value, 1) and value <= MAX_STEPS, f"a whole number from 1 to {MAX_STEPS}")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self._require_choice("lr_schedule", get_args(LrSchedule))
        self._require_choice("objective", OBJECTIVES)
        self._require_choice("mixed_precision", get_args(MixedPrecision))
        steps, start = self.train_steps, self.recipe.start_timestep
        self._require("ema_update_every", self.ema_update_every <= steps, f"at most train_steps, {steps}")
        self._require(
            "warmup_steps",
            _is_int_from(self.warmup_steps, 0) and self.warmup_steps < steps,
            f"a whole number from 0 to below train_steps, {steps}",
        )
        self._require("patience", _is_int_from(self.patience, 0), "a whole number from 1, or 0 for never")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or positive, and finite")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1")
        self._require("val_fraction", 0 < self.val_fraction < 1, "between 0 and 1")
        self._require("seed", type(self.seed) is int, "a whole number")
        self._require(
            "num_timesteps",
            _is_int_from(self.num_timesteps, start) and self.num_timesteps <= MAX_TIMESTEPS,
            f"a whole number from the recipe's start_timestep, {start}, to {MAX_TIMESTEPS}",
        )
        self._require("denoiser_options", _is_json_object(self.denoiser_options), "a JSON object")
        self._require(
            "objective",
            self.recipe.trained_on not in ("pairs", "score") or self.objective == "pred_x0",
            "pred_x0 for a recipe that learns from labels",
        )

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise TrainingError(f"{name} must be {what}, not {getattr(self, name)!r}")

    def _require_choice(self, name: str, known: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")

    def bridge_config(self, dim: int) -> BridgeConfig:
        """Return the configuration of the bridge that this training gives for features of width D."""
        from ezhoi_diffusion.diffusion.artifact import (
            BridgeConfig,  # imports torch, which the flags of `train` do without
        )

        return BridgeConfig(
            dim=dim,
            recipe=self.recipe,
            denoiser=self.denoiser,
            denoiser_options=self.denoiser_options,
            objective=self.objective,
            num_timesteps=self.num_timesteps,
        )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.learning_rate * self.learning_rate_share(step)

    def learning_rate_share(self, step: int) -> float:
        """Return the learning rate as a share of the highest.

        It is (step+1)/W in a warm-up of W steps, then 1, 1−p or (1 + cos πp)/2, where p is the share of the other steps that is
        done. It depends on the step alone, so a resumed run needs no state of it.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (self.train_steps - self.warmup_steps))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
            self.lr_schedule
        ]

    def departures(self, before: dict[str, Any]) -> list[str]:
        """List in words what makes this another run than the one that began with `before`.

        The length of a run may change where that changes none of its steps.
        """
        free = {"patience"} if self.lr_schedule != "constant" else {"patience", "train_steps"}
        return [
            f"{name} (was {before.get(name)!r}, is {value!r})"
            for name, value in self.to_dict().items()
            if name not in free and value != before.get(name)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in types of JSON: a tuple becomes a list, as in a file."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def _is_int_from(value: object, low: int) -> bool:
    return type(value) is int and value >= low


def _is_json_object(value: object) -> bool:
    try:
        json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        return False
    return isinstance(value, dict)
