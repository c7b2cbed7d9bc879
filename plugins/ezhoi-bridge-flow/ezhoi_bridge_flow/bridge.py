"""The velocity network, and the bridge that follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from flow_matching.solver import ODESolver
from torch import Tensor, nn
from torch.nn.functional import normalize

from ezhoi_diffusion import Artifact, Bridge, BridgeError, Pairs, TensorSpec

MODEL, MEANS = "model.safetensors", "means.safetensors"
TABLE = {
    "visual_mean": TensorSpec(torch.float32, "D", -1, 1),
    "text_mean": TensorSpec(torch.float32, "D", -1, 1),
    "scale_factor": TensorSpec(torch.float32, "", 1e-6, 1e6),
}
FREQUENCIES = 8  # of the time embedding


@dataclass(frozen=True)
class Options:
    """Options of the network (width, blocks) and of its application. Raises BridgeError for values out of range."""

    width: int = 512
    blocks: int = 2
    num_steps: int = 4
    blend: float = 1.0
    mean: str = "visual"

    def __post_init__(self) -> None:
        whole = {"width": self.width, "blocks": self.blocks, "num_steps": self.num_steps}
        for name, value in whole.items():
            if type(value) is not int or not 1 <= value <= 4096:
                raise BridgeError(f"flow: {name} is a whole number from 1 to 4096, not {value!r}")
        if isinstance(self.blend, bool) or not isinstance(self.blend, (int, float)) or not 0 <= self.blend <= 1:
            raise BridgeError(f"flow: blend is a number from 0 (nothing changes) to 1, not {self.blend!r}")
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


class Flow(Bridge):
    """x [P, D] -> |x|·unit((1 − blend)·c + blend·φ(c) + restored mean), with c = unit(x) − visual mean.

    φ follows the velocity from time 0 to 1, in units in which a component of c is about 1 (`scale_factor`).
    """

    row_by_row = True
    seeded = True
    settings = ("blend", "num_steps")
    visual_mean: Tensor
    text_mean: Tensor
    scale_factor: Tensor

    def __init__(self, velocity: Velocity, means: Mapping[str, Tensor], options: Options) -> None:
        """means: visual_mean and text_mean [D], scale_factor []."""
        super().__init__()
        self.velocity = velocity
        for name in ("visual_mean", "text_mean", "scale_factor"):
            self.register_buffer(name, means[name])
        self.options = options

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Flow:
        """The bridge in an artefact. Draws no global random number. Raises BridgeError for options out of range."""
        means = artifact.files[MEANS]
        options = Options(**artifact.config["options"])
        dim = len(means["visual_mean"])
        with torch.device("meta"):  # takes no memory: the options may claim any network
            expected = Velocity(dim, options.width, options.blocks).state_dict()
        found = artifact.files[MODEL]
        if {n: (x.dtype, x.shape) for n, x in found.items()} != {n: (x.dtype, x.shape) for n, x in expected.items()}:
            raise BridgeError(f"flow: {MODEL} does not hold the network that config.json describes: fit it again")
        with torch.random.fork_rng(devices=[]):
            velocity = Velocity(dim, options.width, options.blocks)
        velocity.load_state_dict(artifact.files[MODEL])
        bridge = cls(velocity, means, options).eval().requires_grad_(False)
        bridge.provenance, bridge.context = artifact.provenance, artifact.context
        return bridge

    def artifact(self, facts: dict[str, Any], provenance: dict[str, Any]) -> Artifact:
        """What `from_artifact` reads, with facts of the training."""
        means = {"visual_mean": self.visual_mean, "text_mean": self.text_mean, "scale_factor": self.scale_factor}
        files = {MODEL: self.velocity.state_dict(), MEANS: means}
        return Artifact("flow", {"options": asdict(self.options), **facts}, files, provenance)

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Bridge features [P, D]."""
        x = adapter_feat.float()
        with torch.autocast(x.device.type, enabled=False):
            centred = normalize(x, dim=1) - self.visual_mean
            restored = self.text_mean if self.options.mean == "text" else self.visual_mean
            bridged = torch.lerp(centred, self.arrived(centred), self.options.blend) + restored
            result = x.norm(dim=1, keepdim=True) * normalize(bridged, dim=1)
        return result.to(adapter_feat.dtype)

    def arrived(self, centred: Tensor) -> Tensor:
        """φ of centred features [N, D]: where the flow takes them, by the midpoint rule."""
        times = torch.linspace(0, 1, self.options.num_steps + 1)
        solver = ODESolver(velocity_model=self.velocity)
        end: Tensor = solver.sample(centred * self.scale_factor, step_size=None, method="midpoint", time_grid=times)
        return end / self.scale_factor

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Apply the same network with another blend or number of steps. Raises BridgeError for values out of range."""
        self.options = replace(self.options, **settings)
