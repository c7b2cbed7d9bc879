"""The network of the Diffusion Bridge paper, from the package `denoising-diffusion-pytorch`.

The package pulls in torchvision and accelerate, so it is imported only when a network is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ezhoi_diffusion.diffusion.denoiser import DenoiserError
from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule

INIT_DIM = 32
DIM_MULTS = (1, 2, 4, 8)


class Unet1dDenoiser(nn.Module):
    """Convolutions over the coordinates of the embedding. The channel axis stays inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the raw prediction [N, D] for x [N, D] at timesteps t [N] or [1]."""
        return cast(Tensor, self.net(x.unsqueeze(1), t)).squeeze(1)


def build_unet1d(
    dim: int,
    schedule: Schedule,
    objective: Objective,
    scale_factor: float,
    *,
    init_dim: int = INIT_DIM,
    dim_mults: Sequence[int] = DIM_MULTS,
) -> nn.Module:
    """Build the paper's network, with the names and shapes of its checkpoints.

    It has 4,037,313 parameters at D = 512 and 4,070,081 at D = 768.

    Args:
        dim: D, the embedding width.
        schedule: Not used.
        objective: Not used.
        scale_factor: Not used.
        init_dim: Channels at full resolution.
        dim_mults: One multiple of `init_dim` for each resolution. Between two of them the input is halved.

    Raises:
        DenoiserError: The package cannot be imported, D cannot be halved that often, or the network has more than 6
            resolutions or 1024 channels. The largest network allowed takes about 1 GB: an untrusted artefact could
            otherwise claim all memory before its weights are read.
    """
    if type(init_dim) is not int or not 4 <= init_dim <= 256:
        raise DenoiserError(f"unet1d: init_dim must be a whole number from 4 to 256, not {init_dim!r:.100}")
    if (
        not isinstance(dim_mults, (list, tuple))
        or not 1 <= len(dim_mults) <= 6
        or any(type(m) is not int or not 1 <= m * init_dim <= 1024 for m in dim_mults)
    ):
        raise DenoiserError(
            f"unet1d: dim_mults must be 1 to 6 whole numbers that give at most 1024 channels with init_dim = {init_dim}, "
            f"not {dim_mults!r:.100}"
        )
    halvings = len(dim_mults) - 1
    if dim % 2 ** max(1, halvings):  # the embedding of the timestep is half sines, half cosines
        raise DenoiserError(
            f"unet1d halves its input {halvings} times, and D = {dim} is not a multiple of {2 ** max(1, halvings)}: use mlp"
        )
    try:
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d import SinusoidalPosEmb, Unet1D
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch's
        raise DenoiserError(
            f"denoising-diffusion-pytorch cannot be imported ({error}). If that names torchvision, it does not match torch: "
            f"install both from one source (pip install --upgrade torch torchvision), or use the denoiser mlp"
        ) from error
    # The paper's fork takes the width of the time embedding from D, and all others from init_dim. The package has one
    # argument for both, and would build 876 million parameters from the fork's arguments.
    net = Unet1D(dim=init_dim, dim_mults=tuple(dim_mults), channels=1)
    net.time_mlp[0] = SinusoidalPosEmb(dim)
    net.time_mlp[1] = nn.Linear(dim, 4 * init_dim)
    return Unet1dDenoiser(net)
