"""The training loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import rescale
from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule

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
