"""A residual network x + g(x), trained through EZ-HOI's own loss.

The recipe `scored` of the diffusion bridge learns from the same data and loss: this is what its diffusion has to beat.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ezhoi_diffusion.artifact import Artifact, ArtifactConfig
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.labels import PackedLabels, pair_labels
from ezhoi_diffusion.features.loss import KEEP, bridge_loss
from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.schema import Share, TensorSpec

NAME = "residual"
TENSORS = "residual.safetensors"
TABLE = {
    "enter.weight": TensorSpec(torch.float32, "width D"),
    "enter.bias": TensorSpec(torch.float32, "width"),
    "leave.weight": TensorSpec(torch.float32, "D width"),
    "leave.bias": TensorSpec(torch.float32, "D"),
    "mean": TensorSpec(torch.float32, "D"),
    "scale": TensorSpec(torch.float32, "", 1e-12),
}
WIDTH = 128
MAX_WIDTH = 4096
BATCH_SIZE = 512
BLOCK = 4096  # features that are read together
# The first step's learning rate is this divided by D; it falls to 0. A neuron sums over D inputs, so a step moves the sum by the
# same amount whatever D is (Yang et al. 2021, "Tensor programs V").
LEARNING_RATE = 0.5
PROGRESS_SECONDS = 30.0  # between updates of the progress bar in a log
MAX_STEPS = 4000  # of a large capture the last epochs are left out: a minute or two on a CPU core
GRID = {"blend": (0.5, 1.0)}


class ResidualConfig(ArtifactConfig):
    """config.json."""

    blend: Share


class Residual(Bridge):
    """x [P, D] -> x + blend·g(x), with g(x) = s·W₂ silu(W₁ (x − m)/s); m is the mean and s the scale of all features."""

    row_by_row = True
    seeded = True
    settings = ("blend",)
    grid = GRID
    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, width: int = WIDTH, blend: float = 1.0) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, width, dtype=torch.float32)  # whatever the default dtype
        self.leave = nn.Linear(width, dim, dtype=torch.float32)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.blend = checked_blend(blend)

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over a blend from 0 to 1. Raises BridgeError for another value."""
        self.blend = checked_blend(settings.get("blend", self.blend))

    def change(self, x: Tensor) -> Tensor:
        """g(x) [N, D] of float32 features [N, D]."""
        hidden = nn.functional.silu(self.enter((x - self.mean) / self.scale))
        changed: Tensor = self.leave(hidden) * self.scale
        return changed

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Change features [P, D]."""
        x = adapter_feat.float()
        with torch.autocast(x.device.type, enabled=False):
            return (x + self.blend * self.change(x)).to(adapter_feat.dtype)


def checked_blend(blend: object) -> float:
    """A blend as a number. Raises BridgeError unless it is one from 0 to 1."""
    if isinstance(blend, bool) or not isinstance(blend, (int, float)) or not 0 <= blend <= 1:
        raise BridgeError(f"{NAME}: blend is a number from 0 (nothing changes) to 1, not {blend!r}")
    return float(blend)


def load(folder: Path | None) -> Residual:
    """Load the bridge in `folder`. Raises BridgeError."""
    if folder is None:
        raise BridgeError(
            f"{NAME} needs its folder: `ezhoi-diffusion train FEATURES --bridge {NAME} --out DIR` makes it"
        )
    artifact = Artifact.load(folder, NAME, {TENSORS: TABLE}, ResidualConfig)
    tensors = artifact.files[TENSORS]
    width, dim = tensors["enter.weight"].shape
    with torch.random.fork_rng(devices=[]):
        bridge = Residual(dim, width, artifact.config["blend"])
    bridge.load_state_dict(tensors)
    bridge.provenance, bridge.context = artifact.provenance, artifact.context
    return bridge.requires_grad_(False)


def fit(features: FeatureStore, blend: float = 1.0, keep: float = KEEP, epochs: int = 40, seed: int = 0) -> Artifact:
    """A network with one hidden layer that adds to features, trained through EZ-HOI's own loss.

    It learns from all pairs of training images, background included. A second term keeps the logits of all classes near those
    of EZ-HOI (`bridge_loss`).

    Args:
        features: A capture of the train split.
        blend: 0 to 1, the share of the change in the result.
        keep: How many annotations that term counts as much as. More protects unseen classes, less raises seen ones.
        epochs: Passes over all pairs, up to 4000 steps of 512.
        seed: Seed of initial weights and order.

    Raises:
        BridgeError: An option has another value.
        EzhoiDiffusionError: The features have no labels to learn from.
    """
    if type(epochs) is not int or epochs < 1 or type(seed) is not int:
        raise BridgeError(
            f"{NAME}: epochs is a whole number from 1, and seed a whole number, not {epochs!r} and {seed!r}"
        )
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 <= keep < math.inf:
        raise BridgeError(f"{NAME}: keep is a number of at least 0, not {keep!r}")
    visual, labels = StoredRows(features), pair_labels(features)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too
        bridge = Residual(visual.shape[1], blend=blend)
        train(bridge, visual, labels, keep, epochs, seed)
    provenance = {"fingerprint": features.fingerprint, "pairs": len(labels)}
    config = {"blend": bridge.blend, "keep": keep, "epochs": epochs, "seed": seed}
    return Artifact(NAME, config, {TENSORS: bridge.state_dict()}, provenance)


def train(bridge: Residual, visual: StoredRows, labels: PackedLabels, keep: float, epochs: int, seed: int) -> None:
    """Train the network of `bridge` on features [N, D] and their labels."""
    count, dim = visual.shape
    mean = sum((block.double().sum(0) for block in visual.split(BLOCK)), torch.zeros(dim, dtype=torch.float64)) / count
    bridge.mean.copy_(mean)
    squares = sum(float((block.double() - mean).square().sum()) for block in visual.split(BLOCK))
    bridge.scale.fill_(max(1e-12, math.sqrt(squares / (count * dim))))
    positives = labels.positives(slice(None))
    steps = min(MAX_STEPS, epochs * math.ceil(count / BATCH_SIZE))
    optimizer = torch.optim.Adam(bridge.parameters(), lr=LEARNING_RATE / dim, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    batches = itertools.islice(_batches(count, epochs, seed), steps)
    interval = 0.1 if sys.stderr.isatty() else PROGRESS_SECONDS
    for rows in tqdm(batches, f"fit {NAME}", steps, unit="step", delay=2, mininterval=interval, leave=False):
        x, share = visual[rows], len(rows) / count
        loss = bridge_loss(x + bridge.change(x), x, labels[rows], positives * share, keep / positives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows of each batch [n]."""
    for epoch in range(epochs):
        yield from torch.randperm(count, generator=generator(seed, NAME, epoch)).split(BATCH_SIZE)
