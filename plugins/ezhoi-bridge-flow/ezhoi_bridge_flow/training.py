"""Conditional flow matching (Lipman et al., ICLR 2023) from visual features to the texts of their classes."""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, dataclass

import torch
from flow_matching.path import CondOTProbPath
from torch.nn.functional import normalize
from tqdm import tqdm

from ezhoi_bridge_flow.bridge import Flow, Options, Velocity
from ezhoi_diffusion import Artifact, BridgeError, FeatureStore, seen_pairs

EVALUATE_EVERY = 50  # steps
STOPPING_FRACTION = 0.2  # of the images: the tenth held out from every fit, and another tenth that stops the training


@dataclass(frozen=True)
class Training:
    """Options of a training, as `fit` has them. Raises BridgeError for values out of range."""

    train_steps: int
    batch_size: int
    learning_rate: float
    noise: float
    patience: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("train_steps", "batch_size", "patience"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BridgeError(f"flow: {name} is a whole number from 1, not {value!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise BridgeError(f"flow: seed is a whole number from 0, not {self.seed!r}")
        for name in ("learning_rate", "noise"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1e3:
                raise BridgeError(f"flow: {name} is a number from 0, not {value!r}")


def train(features: FeatureStore, options: Options, training: Training) -> Artifact:
    """Train the velocity; keep the weights that are best on a tenth of the images. Draws no global random number."""
    statistics = features.statistics()
    pairs = seen_pairs(features)
    learned_from = torch.isin(pairs.image, seen_pairs(features, fraction=STOPPING_FRACTION).image)
    if learned_from.all():
        raise BridgeError(f"{features.folder} has too few images: none with annotated pairs is left to stop by")
    visual, text = (
        normalize(pairs.visual, dim=1) - statistics.visual_mean,
        normalize(pairs.text, dim=1) - statistics.text_mean,
    )
    start, end = visual[learned_from], text[learned_from]
    scale = start.square().mean().rsqrt()
    means = {"visual_mean": statistics.visual_mean, "text_mean": statistics.text_mean, "scale_factor": scale}
    progress = tqdm(range(training.train_steps + 1), desc="flow", unit="step", file=sys.stderr, mininterval=1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), progress:
        torch.default_generator.manual_seed(training.seed)  # torch.manual_seed would seed other devices too
        bridge = Flow(Velocity(start.shape[1], options.width, options.blocks), means, options)
        optimiser = torch.optim.AdamW(bridge.velocity.parameters(), lr=training.learning_rate)
        path = CondOTProbPath()
        curve, best, waited = list[dict[str, float]](), bridge.velocity.state_dict(), 0
        for step in progress:
            if step % EVALUATE_EVERY == 0 or step == training.train_steps:
                with torch.no_grad():
                    arrived = bridge.arrived(visual[~learned_from])
                cosine = float(torch.cosine_similarity(arrived, text[~learned_from]).mean())
                waited += 1
                if not curve or cosine > max(point["cosine"] for point in curve):
                    best, waited = copy.deepcopy(bridge.velocity.state_dict()), 0
                curve.append({"step": step, "cosine": cosine})
                progress.set_postfix(cosine=f"{cosine:.4f}")
                if waited == training.patience or step == training.train_steps:
                    break
            rows = torch.randint(len(start), (training.batch_size,))
            x_0, x_1 = start[rows] * scale, end[rows] * scale
            x_0 = x_0 + training.noise * torch.randn_like(x_0)
            sample = path.sample(x_0=x_0, x_1=x_1, t=torch.rand(len(rows)))
            loss = (bridge.velocity(sample.x_t, sample.t) - sample.dx_t).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    bridge.velocity.load_state_dict(best)
    facts = {"training": asdict(training), "curve": curve}
    return bridge.artifact(facts, {"fingerprint": features.fingerprint, "pairs": len(pairs)})
