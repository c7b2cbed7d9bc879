"""All measurements of a benchmark in one run."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ezhoi_diffusion.bench.data import BenchData, student_of, trained
from ezhoi_diffusion.bench.measure import busy, machine
from ezhoi_diffusion.bench.memory import of_bridging, of_training
from ezhoi_diffusion.bench.sampling import bridge_cases, cost, fewest, nearness
from ezhoi_diffusion.bench.training import TRAINER_CASES, speed
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.training.config import TrainConfig

# Seconds on two idle cores, for the progress bar
SIZE_SECONDS, STEP_SECONDS, STUDENT_STEP_SECONDS = 20, 0.022, 0.03
FIDELITY_SECONDS, TRAINING_SECONDS, MEMORY_SECONDS = 15, 60, 10


@dataclass(frozen=True)
class BenchConfig:
    """Amount of measuring. A part takes its `seconds` unless its slowest case needs longer."""

    sizes: tuple[int, ...] = (16, 64, 256)
    evaluations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50)
    rounds: int = 2
    seconds: float = 12.0
    features: int = 256
    train_steps: int = TrainConfig.train_steps
    student_steps: int = 600
    batch: int = 64
    training_seconds: float = 40.0


QUICK = BenchConfig(
    sizes=(16, 64),
    evaluations=(1, 5, 10, 20, 50),
    seconds=3.0,
    features=64,
    train_steps=400,
    student_steps=100,
    batch=16,
    training_seconds=5.0,
)


def measure(
    data: BenchData, bridge: DiffusionBridge | None, config: BenchConfig, registry: Components, device: torch.device
) -> dict[str, Any]:
    """Measure everything and show a progress bar.

    Args:
        data: Features and texts to measure on.
        bridge: Bridge to measure; None trains the default one on the texts first.
        config: How much is measured.
        registry: Denoisers and samplers by name.
        device: Where to compute.

    Returns:
        The result as JSON.
    """
    began, facts = time.monotonic(), machine(device)
    total: float = (
        SIZE_SECONDS * len(config.sizes)
        + FIDELITY_SECONDS
        + TRAINING_SECONDS
        + MEMORY_SECONDS * (3 + len(TRAINER_CASES))
    )
    total += STUDENT_STEP_SECONDS * config.student_steps + (0 if bridge else STEP_SECONDS * config.train_steps)
    line = "{desc:26} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go"
    with tqdm(
        total=math.ceil(total), bar_format=line, smoothing=0, mininterval=1 if sys.stderr.isatty() else 15
    ) as bar:
        bar.set_description_str("training a bridge")
        training = None
        if bridge is None:
            training = trained(data, config.train_steps, registry, device, lambda _: bar.update(STEP_SECONDS))
            bridge = training.bridge
        bridge = bridge.to(device)
        bar.set_description_str("distilling a student")
        entries = bridge_cases(
            bridge,
            config.evaluations,
            registry,
            student=student_of(bridge, data, config.student_steps, device),
            gaussian=training.gaussian if training else None,
        )
        bar.update(STUDENT_STEP_SECONDS * config.student_steps)
        ms: dict[str, list[dict[str, float | int]]] = {}
        for pairs in config.sizes:
            bar.set_description_str(f"bridging {pairs} pairs")
            ms[str(pairs)] = cost(entries, data.features, pairs, seconds=config.seconds, rounds=config.rounds)
            bar.update(SIZE_SECONDS)
        bar.set_description_str("comparing few and all evaluations")
        features = data.features[: config.features]
        near = nearness(entries, features, data.text)
        bar.update(FIDELITY_SECONDS)
        bar.set_description_str("steps of training")
        rates = speed(
            data.texts_only,
            batch=config.batch,
            seconds=config.training_seconds,
            rounds=config.rounds,
            registry=registry,
            device=device,
        )
        bar.update(TRAINING_SECONDS)
        memory = []
        sample = features.repeat(-(-config.sizes[-1] // len(features)), 1)[: config.sizes[-1]]
        for entry in entries[:3]:
            bar.set_description_str("memory of bridging")
            taken = of_bridging(entry, sample)
            memory.append({"of": f"bridging {len(sample)} pairs", "name": entry.name, "bytes": taken})
            bar.update(MEMORY_SECONDS)
        for trainer_case in TRAINER_CASES:
            bar.set_description_str("memory of training")
            taken = of_training(trainer_case, data.texts_only, config.batch)
            memory.append({"of": f"training, batch {config.batch}", "name": trainer_case.name, "bytes": taken})
            bar.update(MEMORY_SECONDS)
    sampler = []
    for number, entry in enumerate(entries):
        own = {size: ms[size][number] for size in ms}
        ratio = {size: ms[size][0]["median"] / own[size]["median"] for size in ms}
        judged = near[number]
        sampler.append(
            {**entry.facts(), "ms": own, "ratio": ratio, "fidelity": None if judged is None else asdict(judged)}
        )
    warning = busy(facts)
    return {
        "machine": facts,
        "warnings": [warning] if warning else [],
        "data": {
            "origin": data.origin,
            "features": len(features),
            "texts": len(data.text),
            "dim": data.text.shape[1],
            "bridge": "as given"
            if training is None
            else f"{bridge.config.denoiser}, trained on the texts for {training.steps} steps",
            "student": f"{config.student_steps} steps",
        },
        "config": asdict(config),
        "sampler": sampler,
        "fewest": fewest(sampler, bridge.config),
        "training": rates,
        "closed_form": None if training is None else training.facts(),
        "memory": memory,
        "seconds": time.monotonic() - began,
    }
