"""The network of the Diffusion Bridge paper, from the package `denoising-diffusion-pytorch`.

The only module that imports that package, and only when a network is built: it pulls in torchvision and
accelerate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ezhoi_diffusion.diffusion.schedule import Objective, Schedule
from ezhoi_diffusion.errors import EzhoiDiffusionError

INIT_DIM = 32
DIM_MULTS = (1, 2, 4, 8)


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


def build_unet1d(
    dim: int,
    schedule: Schedule,
    objective: Objective,
    scale: float,
    *,
    init_dim: int = INIT_DIM,
    dim_mults: Sequence[int] = DIM_MULTS,
) -> nn.Module:
    """4,037,313 parameters at D = 512, 4,070,081 at 768, named and shaped as in the paper's checkpoints.

    `dim_mults` has one channel multiple of `init_dim` a resolution; between two of them the input is halved. Raises
    DenoiserError where the package cannot be imported, for a D that cannot be halved so often, and for networks of
    more than 6 resolutions or 1024 channels.
    """
    # The bounds keep a hostile or mistyped artefact from claiming all memory before its weights are looked at: the
    # largest network they admit takes about 1 GB.
    if type(init_dim) is not int or not 4 <= init_dim <= 256:
        raise DenoiserError(f"unet1d: init_dim must be a whole number from 4 to 256, not {init_dim!r:.100}")
    if (
        not isinstance(dim_mults, (list, tuple))
        or not 1 <= len(dim_mults) <= 6
        or any(type(m) is not int or not 1 <= m * init_dim <= 1024 for m in dim_mults)
    ):
        raise DenoiserError(
            f"unet1d: dim_mults must be 1 to 6 whole numbers that make at most 1024 channels of init_dim = {init_dim}, "
            f"not {dim_mults!r:.100}"
        )
    halvings = len(dim_mults) - 1
    if dim % 2**halvings:
        raise DenoiserError(
            f"unet1d halves its input {halvings} times: D = {dim} is not a multiple of {2**halvings}, use mlp"
        )
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
    net = Unet1D(dim=init_dim, dim_mults=tuple(dim_mults), channels=1)
    net.time_mlp[0] = SinusoidalPosEmb(dim)
    net.time_mlp[1] = nn.Linear(dim, 4 * init_dim)
    return Unet1dDenoiser(net)
