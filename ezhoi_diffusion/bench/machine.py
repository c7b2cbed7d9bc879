"""On what a measurement was made, and whether something else ran there."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BUSY = 0.25  # of the cores


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores that this process may use, threads, versions, and the load average of the last minute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "denoising-diffusion-pytorch": version("denoising-diffusion-pytorch"),
        "ezhoi-diffusion": version("ezhoi-diffusion"),
    }


def busy(facts: dict[str, Any]) -> str | None:
    """A warning where other work ran when the measurement began."""
    if facts["load"] <= BUSY * facts["cores"]:
        return None
    return (
        f"the machine is busy with other work (load average {facts['load']:.2f} on {facts['cores']} cores): times are too long "
        f"and spread; ratios suffer less, because what is compared takes turns. Measure again when it is idle"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
