"""The network of the Diffusion Bridge paper, from the package `denoising-diffusion-pytorch`.

The only module that imports that package, and only when a network is built: it pulls in torchvision and
accelerate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.schedule import Objective, Schedule
from ezhoi_diffusion.errors import EzhoiDiffusionError

INIT_DIM = 32
DIM_MULTS = (1, 2, 4, 8)
CHUNK_ROWS = 16  # at once on a CPU, whose cache holds no more: all 64 rows of an image at once take longer
SMALLEST_NORM = 1e-12  # what F.normalize divides by at least


class DenoiserError(EzhoiDiffusionError):
    """A denoiser cannot be built here, or not with these options."""


class Unet1dDenoiser(nn.Module):
    """A convolution over the embedding's coordinates: [N, D], [N] or [1] → [N, D]. Its channel axis stays inside.

    On a CPU, in eval mode and without gradient, the same weights are applied in a faster order, which changes the result by
    rounding only. They are read where they lie at every call, so weights that change are never stale.
    """

    def __init__(self, net: nn.Module, dim: int) -> None:
        super().__init__()
        self.net = net
        self.faster = self._agrees(dim)

    @torch.no_grad()
    def _agrees(self, dim: int) -> bool:
        """Whether both orders give the same here: a later version of the package may compute something else."""
        row, t = torch.linspace(-1, 1, dim).unsqueeze(0), torch.tensor([7])
        was_training = self.training
        self.eval()
        try:
            return bool(
                torch.allclose(
                    _channels_last(self.net, row, cast(Any, self.net).time_mlp(t)), self.plain(row, t), atol=1e-4
                )
            )
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
        finally:
            self.train(was_training)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The raw prediction [N, D] for x [N, D] at levels t [N], or at one for all rows, t [1]."""
        if not self.faster or self.training or torch.is_grad_enabled() or x.device.type != "cpu":
            return self.plain(x, t)
        chunks = x.split(CHUNK_ROWS)
        time = cast(Any, self.net).time_mlp(t)
        times = time.split(CHUNK_ROWS) if len(time) > 1 else [time] * len(chunks)
        return torch.cat([_channels_last(self.net, *each) for each in zip(chunks, times, strict=True)])

    def plain(self, x: Tensor, t: Tensor) -> Tensor:
        """`forward` as the package computes it: for training, and to hold the faster one to."""
        return cast(Tensor, self.net(x.unsqueeze(1), t)).squeeze(1)


# The package's Unet1D in eval mode, step by step, on activations [N, L, C]. Its own are [N, C, L], where a norm over the
# channels strides through memory and takes longer than the convolution before it. What is written into was made just
# before, by the function that does it.


def _channels_last(net: Any, x: Tensor, time: Tensor) -> Tensor:
    """[N, D] → [N, D] at time embeddings [N, E] or [1, E]."""
    first = x = _conv(net.init_conv, x.unsqueeze(-1))
    skipped = []
    for block1, block2, attention, down in net.downs:
        x = _resnet(block1, x, time)
        skipped.append(x)
        x = _linear_attention(attention, _resnet(block2, x, time))
        skipped.append(x)
        x = _conv(down, x)
    x = _resnet(net.mid_block1, x, time)
    x = _resnet(net.mid_block2, _attention(net.mid_attn, x), time)
    for block1, block2, attention, up in net.ups:
        x = _resnet(block1, torch.cat((x, skipped.pop()), dim=-1), time)
        x = _resnet(block2, torch.cat((x, skipped.pop()), dim=-1), time)
        x = _linear_attention(attention, x)
        x = _conv(up, x) if isinstance(up, nn.Conv1d) else _conv(up[1], x.repeat_interleave(2, dim=1))
    x = _resnet(net.final_res_block, torch.cat((x, first), dim=-1), time)
    return _pointwise(net.final_conv, x).squeeze(-1)


def _conv(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution over images of height 1, for only images may be stored channels-last."""
    image = x.unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(image, conv.weight.unsqueeze(2), conv.bias, (1, conv.stride[0]), (0, int(conv.padding[0])))
    return y.permute(0, 2, 3, 1).squeeze(1)


def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.squeeze(-1), conv.bias)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms.clamp_min_(SMALLEST_NORM)


def _gain(norm: Any) -> Tensor:
    """[C], what the package's RMSNorm multiplies unit rows by."""
    gain: Tensor = norm.g.flatten() * math.sqrt(norm.g.numel())
    return gain


def _resnet(resnet: Any, x: Tensor, time: Tensor) -> Tensor:
    scale, shift = resnet.mlp(time).unsqueeze(1).chunk(2, dim=-1)
    block1, block2 = resnet.block1, resnet.block2
    h = _conv(block1.proj, x)
    h = F.silu(torch.addcmul(shift, h.div_(_norms(h)), _gain(block1.norm) * (scale + 1)), inplace=True)
    h = _conv(block2.proj, h)
    h = F.silu(h.div_(_norms(h)).mul_(_gain(block2.norm)), inplace=True)
    return h.add_(x if isinstance(resnet.res_conv, nn.Identity) else _pointwise(resnet.res_conv, x))


def _linear_attention(residual: Any, x: Tensor) -> Tensor:
    """Queries with the channels last, keys and values with them first: no product has to rearrange its factors."""
    norm, attention = residual.fn.norm, residual.fn.fn
    rows, length, channels = x.shape
    project, out_norm = attention.to_out
    query, key, value = (attention.to_qkv.weight.squeeze(-1) * _gain(norm)).chunk(3)
    heads, width = attention.heads, len(query) // attention.heads
    h = x / _norms(x)
    q = F.linear(h, query).unflatten(-1, (heads, width)).softmax(dim=-1).flatten(2)
    k, v = (torch.bmm(w.expand(rows, -1, -1), h.transpose(1, 2)) for w in (key, value))
    k, v = k.softmax(dim=-1).view(-1, width, length), v.view(-1, width, length)
    context = torch.bmm(k, v.transpose(1, 2)).view(rows, heads, width, width)
    # the projection is applied to the context, which is shorter than the sequence
    projection = (project.weight.squeeze(-1) * attention.scale).t().reshape(heads, width, channels)
    h = torch.baddbmm(project.bias, q, torch.matmul(context, projection).flatten(1, 2))
    return h.div_(_norms(h)).mul_(_gain(out_norm)).add_(x)


def _attention(residual: Any, x: Tensor) -> Tensor:
    norm, attention = residual.fn.norm, residual.fn.fn
    h = _pointwise(attention.to_qkv, (x / _norms(x)).mul_(_gain(norm)))
    q, k, v = h.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return _pointwise(attention.to_out, h.transpose(1, 2).flatten(2)).add_(x)


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
    if dim % 2 ** max(1, halvings):  # its embedding of the level is half sines, half cosines
        raise DenoiserError(
            f"unet1d halves its input {halvings} times: D = {dim} is not a multiple of {2 ** max(1, halvings)}, use mlp"
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
    return Unet1dDenoiser(net, dim)
