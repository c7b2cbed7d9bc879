"""Cost of bridging an image, and fidelity of few evaluations to all evaluations of the same network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.bench.measure import interleaved, spread
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.evaluation.fidelity import Fidelity, fidelity
from ezhoi_diffusion.features.statistics import ModalityStatistics

START = 600  # t0 of the guide and of the paper
GUIDE_TIMED = 2  # evaluations: all 600 of the guide take minutes
GUIDES = "the guide's unet1d"
CUBIC = (5, 10)  # evaluations, with timesteps denser near the end
THRESHOLDS = (0.99, 0.999)


@dataclass(frozen=True, eq=False)
class BridgeCase:
    """A bridge to measure, and the one to compare its result with (None: not compared).

    Of a `slow` bridge only GUIDE_TIMED evaluations are timed. The others are assumed to take as long.
    """

    name: str
    bridge: DiffusionBridge
    reference: DiffusionBridge | None
    slow: bool = False

    @property
    def timed(self) -> DiffusionBridge:
        """The bridge whose calls are timed."""
        return self.bridge.override(num_steps=GUIDE_TIMED) if self.slow else self.bridge

    @property
    def time_factor(self) -> float:
        """Number of all evaluations divided by the timed ones."""
        return self.bridge.config.recipe.num_steps / self.timed.config.recipe.num_steps

    def facts(self) -> dict[str, Any]:
        """Describe the case as JSON."""
        recipe = self.bridge.config.recipe
        return {
            "name": self.name,
            "denoiser": self.bridge.config.denoiser,
            "evaluations": recipe.num_steps,
            "start_timestep": recipe.start_timestep,
            "spacing": recipe.spacing,
            "timed_evaluations": self.timed.config.recipe.num_steps,
        }


def bridge_cases(
    bridge: DiffusionBridge,
    evaluations: Sequence[int],
    registry: Components,
    *,
    student: DiffusionBridge | None = None,
    gaussian: DiffusionBridge | None = None,
) -> list[BridgeCase]:
    """List the bridges to measure.

    They are the guide's system, the bridge as it is applied, the same network with more or fewer evaluations from timestep
    600, and `student` and `gaussian` where they are given. A student is measured only as it is applied.
    """
    start = min(START, bridge.config.num_timesteps)
    name, recipe = bridge.config.denoiser, bridge.config.recipe
    entries = [BridgeCase(GUIDES, guide(bridge, registry), None, slow=True)]
    if bridge.config.student_of is not None:
        return [*entries, BridgeCase(f"{name}, a student", bridge, None)]
    entries.append(BridgeCase(f"{name}, recipe {recipe.name}", bridge, every(bridge)))
    if student is not None:
        entries.append(BridgeCase(f"{name}, its student", student, bridge))
    full = every(bridge.override(start_timestep=start, num_steps=start))
    if name == "unet1d":  # hours: timed on few evaluations, and not compared with all of them
        return entries[:1] + [
            BridgeCase(f"{name}, S = {n}", full.override(num_steps=n), None, slow=n > GUIDE_TIMED)
            for n in sorted({recipe.num_steps, *evaluations})
        ]
    entries += [BridgeCase(f"{name}, S = {n}", full.override(num_steps=n), full) for n in evaluations if n <= start]
    entries += [BridgeCase(f"{name}, S = {n}, cubic", full.override(num_steps=n, spacing="cubic"), full) for n in CUBIC]
    if gaussian is not None and name != "gaussian":
        exact = every(gaussian.override(start_timestep=start, num_steps=start))
        entries += [
            BridgeCase(f"gaussian, S = {n}, cubic", exact.override(num_steps=n, spacing="cubic"), exact) for n in CUBIC
        ]
    return entries


def every(bridge: DiffusionBridge) -> DiffusionBridge:
    """Return the bridge with an evaluation at every timestep below its start."""
    return bridge.override(num_steps=bridge.config.recipe.start_timestep)


def guide(bridge: DiffusionBridge, registry: Components) -> DiffusionBridge:
    """Return the guide's bridge for the same features, with fresh weights, which do not change the cost."""
    config = BridgeConfig(bridge.config.dim, RECIPES["guide"], "unet1d")
    return fresh(config, bridge.statistics, registry).to(bridge.input_mean.device)


def fresh(config: BridgeConfig, statistics: ModalityStatistics, registry: Components) -> DiffusionBridge:
    """Make a bridge with fresh weights. The global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        network = build_denoiser(config, registry)
    return DiffusionBridge(config, network, statistics, registry=registry)


def cost(
    entries: Sequence[BridgeCase], features: Tensor, pairs: int, *, seconds: float, rounds: int
) -> list[dict[str, float | int]]:
    """Milliseconds for an image of `pairs` pairs, with all evaluations of each case, in order."""
    device = entries[0].bridge.input_mean.device
    x = features.repeat(-(-pairs // len(features)), 1)[:pairs].to(device)
    calls = {entry.name: partial(entry.timed, x) for entry in entries}
    samples = interleaved(calls, seconds=seconds, rounds=rounds, device=device)
    return [spread([1000 * second * entry.time_factor for second in samples[entry.name]]) for entry in entries]


def nearness(entries: Sequence[BridgeCase], features: Tensor, text: Tensor) -> list[Fidelity | None]:
    """Compare each case with its reference, in the centred space before blending. None for cases without one.

    Args:
        entries: The cases.
        features: Pair features [N, D].
        text: Text features [N_sel, D]. The nearest one is found by cosine to unit(text) less the text mean.
    """
    results: dict[int, Tensor] = {}
    found: list[Fidelity | None] = []
    for entry in entries:
        if entry.reference is None:
            found.append(None)
            continue
        if id(entry.reference) not in results:
            results[id(entry.reference)] = _directions(entry.reference, features)
        reference = results[id(entry.reference)]
        centred = normalize(text) - entry.bridge.statistics.text_mean.to(text)
        found.append(fidelity(_directions(entry.bridge, features), reference, centred.to(reference)))
    return found


def _directions(bridge: DiffusionBridge, features: Tensor) -> Tensor:
    found: Tensor = bridge.override(blend=1.0, output="unit_norm")(features.to(bridge.input_mean.device))
    return found


def fewest(results: Sequence[dict[str, Any]], like: BridgeConfig) -> dict[str, int | None]:
    """Fewest measured evaluations from timestep 600 whose mean cosine reaches each threshold, for this network and spacing."""
    start = min(START, like.num_timesteps)
    sweep = [
        result
        for result in results
        if result["fidelity"] is not None
        and (result["denoiser"], result["start_timestep"], result["spacing"])
        == (like.denoiser, start, like.recipe.spacing)
    ]
    return {
        f"{minimum:g}": min((r["evaluations"] for r in sweep if r["fidelity"]["cosine"] >= minimum), default=None)
        for minimum in THRESHOLDS
    }
