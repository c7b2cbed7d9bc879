"""Measure time and peak memory, and describe the machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from ezhoi_diffusion.errors import EzhoiDiffusionError


class BenchError(EzhoiDiffusionError):
    """The inputs of a measurement do not fit together, or it is not possible on this machine."""


MAX_LOAD = 0.25  # of the cores


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: processor, usable cores, threads, versions, load average of the last minute."""
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
    """Return a warning if other work ran when the measurement began."""
    if facts["load"] <= MAX_LOAD * facts["cores"]:
        return None
    return (
        f"the machine is busy with other work (load average {facts['load']:.2f} on {facts['cores']} cores): times are too long "
        f"and spread. Ratios suffer less, because measurements take turns. Measure again when the machine is idle"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


MIN_TURN = 0.05  # seconds: a fast call is repeated in its turn, so that it gets more samples than a slow one


def take_turns(
    turns: Mapping[str, Callable[[], list[float]]], *, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Measure in turns (A B C A B C …), so that other work on the machine slows all of them.

    Args:
        turns: Functions by name. Each takes one turn and returns its samples.
        seconds: How long to go on.
        rounds: Least number of turns.

    Returns:
        All samples, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in turns}
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        for name, turn in turns.items():
            samples[name] += turn()
        done += 1
    return samples


def repeated(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Return the seconds of each call in one turn of at least `MIN_TURN` seconds.

    torch.utils.benchmark.Timer warms up in every turn, which takes minutes for a call of ten seconds.
    """
    samples: list[float] = []
    end = time.perf_counter() + MIN_TURN
    while not samples or time.perf_counter() < end:
        began = now(device)
        call()
        samples.append(now(device) - began)
    return samples


def now(device: torch.device) -> float:
    """Read the clock in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and number of samples."""
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"median": median(samples), "low": low, "high": high, "samples": len(samples)}


def peak_growth(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which the peak grows while `work` is done."""
    small = torch.randn(64, 64, device=device)
    _ = small @ small  # loads the libraries that every computation needs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak(device)
    work()
    return _peak(device) - before


def _peak(device: torch.device) -> int:
    """Peak bytes allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage on Linux, where a process inherits the peak of its parent
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def in_new_process(measure: Callable[..., int], *arguments: Any) -> int:
    """Call a function of a module in a new process. Raises BenchError where the process is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool as error:
            raise BenchError(
                "the process in which memory is measured was killed: this machine may have too little of it"
            ) from error
