"""The training losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import normalize, rescale, shift
from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.features.labels import PairLabels
from ezhoi_diffusion.features.loss import KEEP, bridge_loss
from ezhoi_diffusion.training.batches import batch_indices, timesteps_and_noise
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingSet

if TYPE_CHECKING:
    import accelerate

Predict = Callable[[Tensor, Tensor], Tensor]


def denoising_loss(
    predict: Predict,
    z: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    objective: Objective,
    scale_factor: float,
    *,
    paired: bool = False,
) -> Tensor:
    """Return the mean over features of weight_t · mean over D of (prediction − target)², as in Diffusion Bridge.

    The network sees x_t at norm `scale_factor`. The target belongs to x_t with its own norm.

    Args:
        predict: The denoiser.
        z: Centred features [N, D] on the network's device.
        t: Timesteps [N] on the CPU.
        noise: What z is mixed with [N, D], on the network's device.
        schedule: The noise schedule.
        objective: What the denoiser predicts.
        scale_factor: The norm of every input of the denoiser.
        paired: Weigh all timesteps alike: features enter at the last one, whose signal-to-noise ratio is 0.
    """
    x = rescale(schedule.q_sample(z, t, noise), scale_factor)
    prediction = predict(x, t.to(z.device, non_blocking=True)).float()
    error = (prediction - schedule.target(objective, z, t, noise)).square().mean(dim=1)
    return error.mean() if paired else (schedule.loss_weight(objective, t).to(error) * error).mean()


def scored_loss(
    predict: Predict,
    visual: Tensor,
    labels: PairLabels,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    features: TrainingSet,
) -> Tensor:
    """Return `bridge_loss` of the features that the denoiser's estimates stand for, in output "free_norm".

    At inference a feature enters without noise, whatever the timestep. All timesteps weigh alike.

    Args:
        predict: The denoiser, of objective pred_x0.
        visual: Features of N pairs [N, D], on the network's device.
        labels: Their labels, on the same device.
        t: Timesteps [N] on the CPU.
        noise: What the centred features are mixed with [N, D], on the network's device.
        schedule: The noise schedule.
        features: The training set of the pairs.
    """
    mean = features.mean.to(noise)
    z, _ = normalize(visual, mean, features.scale_factor)
    x = rescale(schedule.q_sample(z, t, noise), features.scale_factor)
    estimate = predict(x, t.to(z.device, non_blocking=True)).float()
    with torch.autocast(z.device.type, enabled=False):  # logits and their logarithms in float32
        bridged = shift(visual, mean, z, estimate)
        expected = features.positives * len(labels) / len(features.training)
        return bridge_loss(bridged, visual, labels, expected, KEEP / features.positives)


def batch_loss(
    model: Predict,
    accelerator: accelerate.Accelerator,
    features: TrainingSet,
    resident: Tensor | None,
    config: TrainConfig,
    schedule: Schedule,
    batch: int,
) -> Tensor:
    """Return this process's share of the training loss of one global batch.

    Args:
        model: The denoiser, as accelerate prepared it.
        accelerator: Where to compute, in which precision, and which share of the batch.
        features: What to learn from: its `training`.
        resident: `features.resident`.
        config: Objective, batch size and seed.
        schedule: The noise schedule.
        batch: The number of the batch.
    """
    device = accelerator.device
    indices = batch_indices(len(features.training), config.batch_size, config.seed, batch)
    t, noise = timesteps_and_noise((config.batch_size, features.dim), features.num_timesteps, config.seed, batch)
    share = config.batch_size // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    chosen = features.training[indices[own]]
    noise = _to_device(features.noise(chosen, noise[own]), device)
    if features.labelled is not None:
        visual, labels = features.source[chosen].to(device), features.labelled[chosen].to(device)
        with accelerator.autocast():
            return scored_loss(model, visual, labels, t[own], noise, schedule, features)
    z = (features[chosen] if resident is None else resident[_to_device(chosen, device)]).to(device)
    objective, scale_factor = config.objective, config.recipe.scale_factor
    with accelerator.autocast():
        return denoising_loss(model, z, t[own], noise, schedule, objective, scale_factor, paired=features.paired)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from pinned memory to a GPU, so that the step does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
