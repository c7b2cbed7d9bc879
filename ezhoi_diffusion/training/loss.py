"""The training losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import normalize, rescale, shift
from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.features.labels import LabelledPairs
from ezhoi_diffusion.features.loss import KEEP, bridge_loss
from ezhoi_diffusion.training.data import TrainingSet

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
    predict: Predict, pairs: LabelledPairs, t: Tensor, noise: Tensor, schedule: Schedule, features: TrainingSet
) -> Tensor:
    """Return `bridge_loss` of the features that the denoiser's estimates stand for, in output "free_norm".

    At inference a feature enters without noise, whatever the timestep. All timesteps weigh alike.

    Args:
        predict: The denoiser, of objective pred_x0.
        pairs: N pairs on the network's device.
        t: Timesteps [N] on the CPU.
        noise: What the centred features are mixed with [N, D], on the network's device.
        schedule: The noise schedule.
        features: The training set of the pairs.
    """
    mean = features.mean.to(noise)
    z, _ = normalize(pairs.visual, mean, features.scale_factor)
    x = rescale(schedule.q_sample(z, t, noise), features.scale_factor)
    estimate = predict(x, t.to(z.device, non_blocking=True)).float()
    with torch.autocast(z.device.type, enabled=False):  # logits and their logarithms in float32
        bridged = shift(pairs.visual, mean, z, estimate)
        expected = features.positives * len(pairs) / len(features.training)
        return bridge_loss(bridged, pairs, expected, KEEP / features.positives)
