"""Times of things that are to be compared: taken in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch

TURN = 0.05  # seconds: what is fast is called several times in its turn, lest it has few samples where another is slow


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call, each on its own, warm: A B C A B C …, until `seconds` are over, and `rounds` times at least.

    Not torch.utils.benchmark's Timer, which warms up anew for every turn: minutes, for a call that takes ten seconds.
    """
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        for name, call in calls.items():
            turn = time.perf_counter() + TURN
            while True:
                began = now(device)
                call()
                samples[name].append(now(device) - began)
                if time.perf_counter() >= turn:
                    break
        done += 1
    return samples


def now(device: torch.device) -> float:
    """The clock in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, lower and upper quartile, and of how many."""
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"median": median(samples), "low": low, "high": high, "samples": len(samples)}
