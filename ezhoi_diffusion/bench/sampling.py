"""Cost of bridging an image, and fidelity of few evaluations to all evaluations of the same network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.bench.measure import peak_growth, repeated, spread, take_turns
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.components import Components, components
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.training.fidelity import fidelity

START = 600  # t0 of the guide and of the paper
GUIDE_TIMED = 2  # evaluations: all 600 of the guide take minutes
GUIDES = "the guide's unet1d"
CUBIC = 5  # evaluations of the Gaussian, with timesteps denser near the end


@dataclass(frozen=True, eq=False)
class BridgeCase:
    """A bridge to measure, and the one to compare its result with (None: not compared)."""

    name: str
    bridge: DiffusionBridge
    reference: DiffusionBridge | None = None

    @property
    def timed(self) -> DiffusionBridge:
        """The bridge whose calls are timed: of `unet1d`, GUIDE_TIMED evaluations. The others take as long."""
        slow = self.bridge.config.denoiser == "unet1d" and self.bridge.config.recipe.num_steps > GUIDE_TIMED
        return self.bridge.override(num_steps=GUIDE_TIMED) if slow else self.bridge

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
    gaussian: DiffusionBridge | None = None,
) -> list[BridgeCase]:
    """List the bridges to measure.

    They are the guide's system, the bridge as it is applied, the same network with more or fewer evaluations from timestep
    600, and `gaussian` where it is given. A student and `unet1d`, whose evaluations take minutes, are measured only as applied.
    """
    start = min(START, bridge.config.num_timesteps)
    name, recipe = bridge.config.denoiser, bridge.config.recipe
    config = BridgeConfig(bridge.config.dim, RECIPES["guide"], "unet1d")
    guide = fresh(config, bridge.statistics, registry).to(bridge.input_mean.device)
    if bridge.config.student_of is not None:
        return [BridgeCase(GUIDES, guide), BridgeCase(f"{name}, a student", bridge)]
    applied = f"{name}, recipe {recipe.name}"
    if name == "unet1d":
        return [BridgeCase(GUIDES, guide), BridgeCase(applied, bridge)]
    full = bridge.override(start_timestep=start, num_steps=start)
    cases = [
        BridgeCase(GUIDES, guide),
        BridgeCase(applied, bridge, bridge.override(num_steps=recipe.start_timestep)),
        *(BridgeCase(f"{name}, S = {n}", full.override(num_steps=n), full) for n in evaluations if n <= start),
    ]
    if gaussian is not None:
        exact = gaussian.override(start_timestep=start, num_steps=start)
        few = exact.override(num_steps=CUBIC, spacing="cubic")
        cases.append(BridgeCase(f"gaussian, S = {CUBIC}, cubic", few, exact))
    return cases


def fresh(config: BridgeConfig, statistics: ModalityStatistics, registry: Components) -> DiffusionBridge:
    """Make a bridge with fresh weights, which do not change the cost. The global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        network = build_denoiser(config, registry)
    return DiffusionBridge(config, network, statistics, registry=registry)


def image_of(features: Tensor, pairs: int) -> Tensor:
    """Repeat or cut features [N, D] to those of an image with that many pairs."""
    return features.repeat(-(-pairs // len(features)), 1)[:pairs]


def cost(
    cases: Sequence[BridgeCase], features: Tensor, pairs: int, *, seconds: float, rounds: int
) -> list[dict[str, float | int]]:
    """Milliseconds for an image of `pairs` pairs, with all evaluations of each case, in order."""
    device = cases[0].bridge.input_mean.device
    x = image_of(features, pairs).to(device)
    turns = {}
    for case in cases:
        case.timed(x)  # the first call is slower
        turns[case.name] = partial(repeated, partial(case.timed, x), device)
    samples = take_turns(turns, seconds=seconds, rounds=rounds)
    results = []
    for case in cases:
        facts = case.facts()
        scale = 1000 * facts["evaluations"] / facts["timed_evaluations"]
        results.append(spread([scale * second for second in samples[case.name]]))
    return results


def nearness(cases: Sequence[BridgeCase], features: Tensor, text: Tensor) -> list[dict[str, Any] | None]:
    """Compare each case with its reference, in the centred space before blending. None for cases without one.

    Args:
        cases: The cases.
        features: Pair features [N, D].
        text: Text features [N_sel, D]. The nearest one is found by cosine to unit(text) less the text mean.

    Returns:
        The fields of `Fidelity`, in order.
    """

    @cache
    def directions(bridge: DiffusionBridge) -> Tensor:
        found: Tensor = bridge.override(blend=1.0, output="unit_norm")(features.to(bridge.input_mean.device))
        return found

    def compare(bridge: DiffusionBridge, reference: DiffusionBridge) -> dict[str, Any]:
        found = directions(bridge)
        centred = normalize(text) - bridge.statistics.text_mean.to(text)
        return asdict(fidelity(found, directions(reference), centred.to(found)))

    return [compare(case.bridge, case.reference) if case.reference else None for case in cases]


def memory(config: BridgeConfig, statistics: ModalityStatistics, features: Tensor, device: torch.device) -> int:
    """Bytes that a bridge and bridging features [N, D] with it add to this process, which has to be a new one."""
    import denoising_diffusion_pytorch  # noqa: F401, to load modules before measuring

    registry = components(PluginManager())
    return peak_growth(lambda: fresh(config, statistics, registry).to(device)(features.to(device)), device)
