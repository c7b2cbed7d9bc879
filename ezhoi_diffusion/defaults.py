"""Torch's global settings: whoever sets them for a whole process must not change what is computed here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Make new tensors float32 on the CPU inside, as torch does by itself, whatever EZ-HOI or a plugin has set."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # a default device makes every call of torch slower, the CPU too
        with torch.device("cpu") if torch.empty(0).device.type != "cpu" else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def kept_globals() -> Iterator[list[str]]:
    """Put torch's global settings back afterwards. The list that it yields then names those that were changed."""
    before = {name: get() for name, get, _ in _settings()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, get, put in _settings():
            if name in before and get() != before[name]:
                put(before[name])
                changed.append(name)


def _settings() -> list[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    """(name, get, set) of each; none before torch is imported."""
    if "torch" not in sys.modules:
        return []
    import torch

    def device() -> torch.device:
        return torch.empty(0).device  # torch.get_default_device of torch 2.5 overlooks `with torch.device(…)`

    def set_device(device: torch.device) -> None:
        torch.set_default_device(None if device.type == "cpu" else device)

    return [
        ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        ("default device", device, set_device),
        ("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
        ("number of threads", torch.get_num_threads, torch.set_num_threads),
        ("deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    ]
