"""All measurements of a bench in one run, in order."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ezhoi_diffusion.bench.data import BenchData, student_of, trained
from ezhoi_diffusion.bench.machine import busy, machine
from ezhoi_diffusion.bench.memory import of_bridging, of_training
from ezhoi_diffusion.bench.sampling import bridge_cases, cost, fewest, nearness
from ezhoi_diffusion.bench.training import TRAINER_CASES, speed
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.training.config import TrainConfig

TIMED = 20  # seconds that bridging one size takes on two idle cores, and the others likewise: the bar counts these
STEP, STUDENT_STEP, JUDGED, TRAINED, CHILD = 0.022, 0.03, 15, 60, 10


@dataclass(frozen=True)
class BenchConfig:
    """How much is measured. Seconds are what a part takes where its slowest contender leaves it the choice."""

    sizes: tuple[int, ...] = (16, 64, 256)
    evaluations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50)
    rounds: int = 2
    seconds: float = 12.0
    rows: int = 256
    train_steps: int = TrainConfig.train_steps
    student_steps: int = 600
    batch: int = 64
    training_seconds: float = 40.0


QUICK = BenchConfig(
    sizes=(16, 64),
    evaluations=(1, 5, 10, 20, 50),
    seconds=3.0,
    rows=64,
    train_steps=400,
    student_steps=100,
    batch=16,
    training_seconds=5.0,
)


def measure(
    subject: BenchData, bridge: DiffusionBridge | None, effort: BenchConfig, registry: Components, device: torch.device
) -> dict[str, Any]:
    """The result as JSON. Without a bridge the default one is trained first, on the subject's texts.

    A bar says how far it is and how long it takes. Raises what the parts raise.
    """
    began, facts = time.monotonic(), machine(device)
    total: float = TIMED * len(effort.sizes) + JUDGED + TRAINED + CHILD * (3 + len(TRAINER_CASES))
    total += STUDENT_STEP * effort.student_steps + (0 if bridge else STEP * effort.train_steps)
    line = "{desc:26} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go"
    with tqdm(
        total=math.ceil(total), bar_format=line, smoothing=0, mininterval=1 if sys.stderr.isatty() else 15
    ) as bar:
        bar.set_description_str("training a bridge")
        training = None
        if bridge is None:
            training = trained(subject, effort.train_steps, registry, device, lambda _: bar.update(STEP))
            bridge = training.bridge
        bridge = bridge.to(device)
        bar.set_description_str("distilling a student")
        entries = bridge_cases(
            bridge,
            effort.evaluations,
            registry,
            student=student_of(bridge, subject, effort.student_steps, device),
            gaussian=training.gaussian if training else None,
        )
        bar.update(STUDENT_STEP * effort.student_steps)
        ms: dict[str, list[dict[str, float | int]]] = {}
        for pairs in effort.sizes:
            bar.set_description_str(f"bridging {pairs} pairs")
            ms[str(pairs)] = cost(entries, subject.rows, pairs, seconds=effort.seconds, rounds=effort.rounds)
            bar.update(TIMED)
        bar.set_description_str("few against all evaluations")
        rows = subject.rows[: effort.rows]
        near = nearness(entries, rows, subject.text)
        bar.update(JUDGED)
        bar.set_description_str("steps of training")
        rates = speed(
            subject.data,
            batch=effort.batch,
            seconds=effort.training_seconds,
            rounds=effort.rounds,
            registry=registry,
            device=device,
        )
        bar.update(TRAINED)
        memory = []
        sample = rows.repeat(-(-effort.sizes[-1] // len(rows)), 1)[: effort.sizes[-1]]
        for entry in entries[:3]:
            bar.set_description_str("memory of bridging")
            taken = of_bridging(entry, sample)
            memory.append({"of": f"bridging {len(sample)} pairs", "name": entry.name, "bytes": taken})
            bar.update(CHILD)
        for trainer_case in TRAINER_CASES:
            bar.set_description_str("memory of training")
            taken = of_training(trainer_case, subject.data, effort.batch)
            memory.append({"of": f"training, batch {effort.batch}", "name": trainer_case.name, "bytes": taken})
            bar.update(CHILD)
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
        "subject": {
            "origin": subject.origin,
            "rows": len(rows),
            "texts": len(subject.text),
            "dim": subject.text.shape[1],
            "bridge": "as given"
            if training is None
            else f"{bridge.config.denoiser}, trained on the texts for {training.steps} steps",
            "student": f"{effort.student_steps} steps",
        },
        "effort": asdict(effort),
        "sampler": sampler,
        "fewest": fewest(sampler, bridge.config),
        "training": rates,
        "closed_form": None if training is None else training.facts(),
        "memory": memory,
        "seconds": time.monotonic() - began,
    }
