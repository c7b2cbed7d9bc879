"""Small diffusion bridges."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ezhoi_diffusion.diffusion.bridge import (
    BridgeConfig,
    DiffusionBridge,
    build_denoiser,
)
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.features.statistics import ModalityStatistics

DIM = 64
MLP = {"width": 32, "depth": 1}


def features(count: int = 40, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Features [count, dim] with a common offset, as CLIP's have one."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * (torch.randn(count, dim, generator=generator) + 1.5 * torch.randn(dim, generator=generator))


def statistics(dim: int = DIM) -> ModalityStatistics:
    """Return the means of such features, and of texts."""
    return ModalityStatistics.compute([features(dim=dim)], features(20, dim, seed=1))


def make(recipe: str = "gentle", objective: str = "pred_x0", chunk_size: int = 1024, **changes) -> DiffusionBridge:
    """Build a bridge around an MLP with random weights in every layer."""
    chosen = replace(RECIPES[recipe], **changes)
    config = BridgeConfig(DIM, chosen, "mlp", MLP, objective)  # type: ignore
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(config)
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.1)
    return DiffusionBridge(config, denoiser, statistics(), provenance={"run": {"D": DIM}}, chunk_size=chunk_size)
