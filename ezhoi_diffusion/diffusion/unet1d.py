"""The network of the Diffusion Bridge paper, from the package `denoising-diffusion-pytorch`.

The only module that imports that package, and only when a network is built: it pulls in torchvision and
accelerate.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ezhoi_diffusion.diffusion.schedule import Objective, Schedule
from ezhoi_diffusion.errors import EzhoiDiffusionError

INIT_DIM = 32
DOWNSAMPLING = 8


class DenoiserError(EzhoiDiffusionError):
    """A denoiser cannot be built here, or not with these options."""


class Unet1dDenoiser(nn.Module):
    """A convolution over the embedding's coordinates: [N, D], [N] → [N, D]. Its channel axis stays inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The raw prediction [N, D] for x [N, D] at levels t [N]."""
        return cast(Tensor, self.net(x.unsqueeze(1), t)).squeeze(1)


def build_unet1d(dim: int, schedule: Schedule, objective: Objective, scale: float) -> nn.Module:
    """4,037,313 parameters at D = 512, 4,070,081 at 768, named and shaped as in the paper's checkpoints.

    Raises DenoiserError where the package cannot be imported, or D is not a multiple of 8.
    """
    if dim % DOWNSAMPLING:
        raise DenoiserError(f"unet1d halves its input three times: D = {dim} is not a multiple of 8, use mlp")
    try:
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d import SinusoidalPosEmb, Unet1D
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch's
        raise DenoiserError(
            f"denoising-diffusion-pytorch cannot be imported ({error}). If that names torchvision, it does "
            "not match torch: install both from the same source (pip install --upgrade torch torchvision), "
            "or use the denoiser mlp, which needs neither"
        ) from error
    # The paper's fork takes the time embedding's width from D and all others from init_dim. The package has
    # one argument for both, and would build 876 million parameters from the fork's arguments.
    net = Unet1D(dim=INIT_DIM, channels=1)
    net.time_mlp[0] = SinusoidalPosEmb(dim)
    net.time_mlp[1] = nn.Linear(dim, 4 * INIT_DIM)
    return Unet1dDenoiser(net)
