"""The denoisers and samplers that a diffusion bridge may be made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ezhoi_diffusion.diffusion.closed_form import build_empirical, build_gaussian
from ezhoi_diffusion.diffusion.denoiser import DenoiserBuilder
from ezhoi_diffusion.diffusion.mlp import build_mlp
from ezhoi_diffusion.diffusion.samplers import Sampler, cold, ddim, published
from ezhoi_diffusion.diffusion.unet1d import build_unet1d
from ezhoi_diffusion.registry import Registry

if TYPE_CHECKING:
    from ezhoi_diffusion.plugins import PluginManager

DENOISERS: dict[str, DenoiserBuilder] = {
    "mlp": build_mlp,
    "unet1d": build_unet1d,
    "gaussian": build_gaussian,
    "empirical": build_empirical,
}
SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "cold": cold, "published": published}


@dataclass(frozen=True)
class Components:
    """Denoisers and samplers by name: those that ship, and those that plugins added."""

    denoisers: Registry[DenoiserBuilder] = field(default_factory=lambda: Registry("denoiser", DENOISERS))
    samplers: Registry[Sampler] = field(default_factory=lambda: Registry("sampler", SAMPLERS))


def components(plugins: PluginManager) -> Components:
    """Collect the components that ship and those that `plugins` contribute. Raises PluginError."""
    found = Components()
    plugins.collect("register_denoisers", found.denoisers)
    plugins.collect("register_samplers", found.samplers)
    return found
