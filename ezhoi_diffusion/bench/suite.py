"""All measurements of a benchmark in one run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ezhoi_diffusion.bench import sampling, training
from ezhoi_diffusion.bench.data import trained
from ezhoi_diffusion.bench.measure import busy, in_new_process, machine
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData


@dataclass(frozen=True)
class BenchConfig:
    """Amount of measuring. A part takes its `seconds` unless its slowest case needs longer."""

    sizes: tuple[int, ...] = (16, 64, 256)
    evaluations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50)
    rounds: int = 2
    seconds: float = 12.0
    features: int = 256
    train_steps: int = TrainConfig.train_steps
    batch: int = 64
    training_seconds: float = 40.0


QUICK = BenchConfig(
    sizes=(16, 64),
    evaluations=(1, 5, 10, 20, 50),
    seconds=3.0,
    features=64,
    train_steps=400,
    batch=16,
    training_seconds=5.0,
)


def measure(
    data: TrainingData, bridge: DiffusionBridge | None, config: BenchConfig, registry: Components, device: torch.device
) -> dict[str, Any]:
    """Measure everything and show on stderr which part is measured.

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
    with tqdm(total=len(config.sizes) + 4, bar_format="part {n} of {total}, after {elapsed}: {desc}") as bar:

        def part(name: str) -> None:
            bar.update()
            bar.set_description_str(name)

        part("training a bridge" if bridge is None else "preparing the bridge")
        gaussian = closed_form = None
        origin = "as given"
        if bridge is None:
            bridge, gaussian, closed_form = trained(data, config.train_steps, registry, device)
            origin = f"{bridge.config.denoiser}, trained on the texts for {config.train_steps} steps"
        cases = sampling.bridge_cases(bridge.to(device), config.evaluations, registry, gaussian)
        visual = data.visual[torch.arange(len(data.visual))]
        ms: dict[str, list[dict[str, float | int]]] = {}
        for pairs in config.sizes:
            part(f"bridging {pairs} pairs")
            ms[str(pairs)] = sampling.cost(cases, visual, pairs, seconds=config.seconds, rounds=config.rounds)
        part("comparing few and all evaluations")
        features = visual[: config.features]
        near = sampling.nearness(cases, features, data.text)
        part("steps of training")
        rates = training.speed(
            data,
            batch=config.batch,
            seconds=config.training_seconds,
            rounds=config.rounds,
            registry=registry,
            device=device,
        )
        part("memory")
        memory, image = [], sampling.image_of(features, config.sizes[-1])
        for case in cases[:2]:
            taken = in_new_process(sampling.memory, case.timed.config, bridge.statistics, image, device)
            memory.append({"of": f"bridging {len(image)} pairs", "name": case.name, "bytes": taken})
        for name in training.TRAINERS:
            taken = in_new_process(training.memory, name, data, config.batch)
            memory.append({"of": f"training, batch {config.batch}", "name": name, "bytes": taken})
    sampler = []
    for number, case in enumerate(cases):
        own = {size: results[number] for size, results in ms.items()}
        ratio = {size: results[0]["median"] / results[number]["median"] for size, results in ms.items()}
        sampler.append({**case.facts(), "ms": own, "ratio": ratio, "fidelity": near[number]})
    warning = busy(facts)
    return {
        "machine": facts,
        "warnings": [warning] if warning else [],
        "data": {
            "origin": data.provenance["origin"],
            "features": len(features),
            "texts": len(data.text),
            "dim": data.statistics.dim,
            "bridge": origin,
        },
        "config": asdict(config),
        "sampler": sampler,
        "training": rates,
        "closed_form": closed_form,
        "memory": memory,
        "seconds": time.monotonic() - began,
    }
