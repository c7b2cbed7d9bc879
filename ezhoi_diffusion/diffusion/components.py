"""The denoisers and samplers that a bridge may be made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ezhoi_diffusion.diffusion.networks import DenoiserBuilder, denoisers
from ezhoi_diffusion.diffusion.samplers import Sampler, samplers
from ezhoi_diffusion.registry import Registry

if TYPE_CHECKING:
    from ezhoi_diffusion.plugins import PluginManager


@dataclass(frozen=True)
class Components:
    """Denoisers and samplers by name: those that ship, and those that plugins added."""

    denoisers: Registry[DenoiserBuilder] = field(default_factory=denoisers)
    samplers: Registry[Sampler] = field(default_factory=samplers)


def components(plugins: PluginManager) -> Components:
    """Collect the components that ship and those that `plugins` contribute. Raises PluginError."""
    found = Components()
    plugins.collect("register_denoisers", found.denoisers)
    plugins.collect("register_samplers", found.samplers)
    return found
