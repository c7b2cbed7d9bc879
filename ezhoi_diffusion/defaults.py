"""Global settings, most of them torch's: whoever sets them for a whole process must not change what is computed here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

AUTOCAST = ("cpu", "cuda")  # kinds of devices


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Make new tensors float32 on the CPU inside, without autocast and inference mode, as torch does by itself.

    EZ-HOI or a plugin may have set something else.
    """
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as inside:
            if torch.empty(0).device.type != "cpu":  # a default device makes every call of torch slower, the CPU too
                inside.enter_context(torch.device("cpu"))
            for kind in filter(torch.is_autocast_enabled, AUTOCAST):
                inside.enter_context(torch.autocast(kind, enabled=False))
            if torch.is_inference_mode_enabled():
                inside.enter_context(torch.inference_mode(mode=False))
                inside.enter_context(torch.no_grad())  # leaving inference mode would track gradients
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def kept_globals() -> Iterator[list[str]]:
    """Put global settings back afterwards. The list that it yields then names those that were changed."""
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
    """(name, get, set) of each; those of torch once it is imported."""
    found: list[tuple[str, Callable[[], Any], Callable[[Any], Any]]] = [
        ("standard output", lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
        ("standard error", lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
        ("working folder", _working_folder, os.chdir),
    ]
    if "torch" not in sys.modules:
        return found
    import torch

    def autocast() -> list[bool]:
        return [torch.is_autocast_enabled(kind) for kind in AUTOCAST]

    def set_autocast(enabled: list[bool]) -> None:
        for kind, on in zip(AUTOCAST, enabled, strict=True):
            torch.set_autocast_enabled(kind, on)

    def device() -> torch.device:
        return torch.empty(0).device  # torch.get_default_device of torch 2.5 overlooks `with torch.device(…)`

    def set_device(device: torch.device) -> None:
        torch.set_default_device(None if device.type == "cpu" else device)

    return [
        *found,
        ("autocast", autocast, set_autocast),
        ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        ("default device", device, set_device),
        ("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
        ("number of threads", torch.get_num_threads, torch.set_num_threads),
        ("deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    ]


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109  os.chdir takes it back
    except FileNotFoundError:  # somebody has deleted it
        return os.curdir
