"""The velocity network, and the bridge that follows it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from flow_matching.solver import ODESolver
from torch import Tensor, nn

from ezhoi_diffusion import Artifact, BridgeError, unit

MODEL, MEANS = "model.safetensors", "means.safetensors"
FREQUENCIES = 8  # of the time embedding


@dataclass(frozen=True)
class Options:
    """Of the network (width, blocks) and of its application. Raises BridgeError for values out of range."""

    width: int = 512
    blocks: int = 2
    steps: int = 4
    blend: float = 1.0
    mean: str = "visual"

    def __post_init__(self) -> None:
        whole = {"width": self.width, "blocks": self.blocks, "steps": self.steps}
        for name, value in whole.items():
            if type(value) is not int or not 1 <= value <= 4096:
                raise BridgeError(f"flow: {name} is a whole number from 1 to 4096, not {value!r}")
        if not isinstance(self.blend, (int, float)) or not 0 <= self.blend <= 1:
            raise BridgeError(f"flow: strength is a number from 0 (nothing changes) to 1, not {self.blend!r}")
        if self.mean not in ("visual", "text"):
            raise BridgeError(f"flow: mean is visual or text, not {self.mean!r}")


class Velocity(nn.Module):
    """dx/dt [N, D] at x [N, D] and time t, [N] or []: a residual perceptron that starts as 0."""

    frequencies: Tensor

    def __init__(self, dim: int, width: int, blocks: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, FREQUENCIES + 1), persistent=False)
        self.enter = nn.Linear(dim, width)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        last = nn.Linear(width, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.leave = nn.Sequential(nn.LayerNorm(width), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity."""
        angles = t.reshape(-1, 1) * self.frequencies
        h = self.enter(x) + self.time(torch.cat([angles.cos(), angles.sin()], 1))
        for block in self.blocks:
            h = h + block(h)
        velocity: Tensor = self.leave(h)
        return velocity


class Flow(nn.Module):
    """x [P, D] -> |x|·unit((1 − strength)·c + strength·φ(c) + mean given back), c = unit(x) − visual mean.

    φ follows the velocity from time 0 to 1, in units in which a component of c is about 1 (`scale`).
    """

    row_by_row = True
    depends_on_seed = True
    settings = ("blend", "steps")
    visual_mean: Tensor
    text_mean: Tensor
    scale: Tensor

    def __init__(self, velocity: Velocity, means: Mapping[str, Tensor], options: Options) -> None:
        """means: visual_mean and text_mean [D], scale []."""
        super().__init__()
        self.velocity = velocity
        for name in ("visual_mean", "text_mean", "scale"):
            self.register_buffer(name, means[name])
        self.options = options
        self.provenance: dict[str, Any] = {}
        self.context: dict[str, Tensor] = {}

    @classmethod
    def of(cls, artifact: Artifact) -> Flow:
        """The bridge that an artefact holds; draws no global random number. Raises BridgeError for options out of range."""
        means = artifact.files[MEANS]
        options = Options(**artifact.config["options"])
        with torch.random.fork_rng(devices=[]):
            velocity = Velocity(len(means["visual_mean"]), options.width, options.blocks)
        velocity.load_state_dict(artifact.files[MODEL])
        bridge = cls(velocity, means, options).eval().requires_grad_(False)
        bridge.provenance, bridge.context = artifact.provenance, artifact.context
        return bridge

    def artifact(self, facts: dict[str, Any], provenance: dict[str, Any]) -> Artifact:
        """What `of` reads, with facts of the training beside it."""
        means = {"visual_mean": self.visual_mean, "text_mean": self.text_mean, "scale_factor": self.scale}
        files = {MODEL: self.velocity.state_dict(), MEANS: means}
        return Artifact("flow", {"options": asdict(self.options), **facts}, files, provenance)

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor) -> Tensor:
        """Rows as they arrive, in their dtype and on their device."""
        x = adapter_feat.float()
        with torch.autocast(x.device.type, enabled=False):
            centred = unit(x) - self.visual_mean
            restored = self.text_mean if self.options.mean == "text" else self.visual_mean
            rows = torch.lerp(centred, self.arrived(centred), self.options.blend) + restored
            result: Tensor = (x.norm(dim=1, keepdim=True) * unit(rows)).to(adapter_feat.dtype)
        return result

    def arrived(self, centred: Tensor) -> Tensor:
        """φ of rows [N, D]: where the flow takes them, by the midpoint rule."""
        grid = torch.linspace(0, 1, self.options.steps + 1)
        solver = ODESolver(velocity_model=self.velocity)
        end: Tensor = solver.sample(centred * self.scale, step_size=None, method="midpoint", time_grid=grid)
        return end / self.scale

    def sweep(self, points: Sequence[Mapping[str, Any]]) -> list[Flow]:
        """The same network with the strength and steps of each point; the provenance says so. Raises BridgeError."""
        swept = []
        for point in points:
            bridge = copy.copy(self)
            bridge.options = replace(self.options, **point)
            bridge.provenance = {**self.provenance, "overridden": dict(point)}
            swept.append(bridge)
        return swept
