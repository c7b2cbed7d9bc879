"""Peak memory, each in a process of its own: what one needs is not hidden by what another has left behind."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.bench.data import BenchError
from ezhoi_diffusion.bench.sampling import GUIDE_TIMED, BridgeCase, fresh
from ezhoi_diffusion.bench.training import TrainerCase, take_steps, training
from ezhoi_diffusion.diffusion.bridge import BridgeConfig
from ezhoi_diffusion.diffusion.components import components
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.training.data import TrainingData

STEPS = 2  # the optimizer's state is made at the end of the first


def of_bridging(entry: BridgeCase, rows: Tensor) -> int:
    """Bytes that a bridge of this kind and bridging rows [N, D] with it add to a process."""
    config = entry.bridge.config
    steps = min(GUIDE_TIMED, config.recipe.num_steps)  # memory does not grow with them
    return _elsewhere(_bridge, config, entry.bridge.statistics, rows.cpu(), steps)


def of_training(trainer_case: TrainerCase, data: TrainingData, batch: int) -> int:
    """Bytes that a training adds to its process; the workers of a data loader are not counted."""
    return _elsewhere(_train, trainer_case, data, batch)


def _bridge(config: BridgeConfig, statistics: ModalityStatistics, rows: Tensor, steps: int) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    registry = components(PluginManager())
    if config.denoiser == "unet1d":
        import denoising_diffusion_pytorch  # noqa: F401, because modules are not what is measured
    with _watched(device) as grown:
        bridge = fresh(config, statistics, registry)
        (bridge if config.student_of else bridge.override(num_steps=steps)).to(device)(rows.to(device))
    return grown[0]


def _train(trainer_case: TrainerCase, data: TrainingData, batch: int) -> int:
    import accelerate
    import denoising_diffusion_pytorch  # noqa: F401, as above

    device = accelerate.Accelerator().device
    with _watched(device) as grown, training(trainer_case, data, batch, components(PluginManager())) as turn:
        take_steps(turn, STEPS)
    return grown[0]


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int]]:
    """By how many bytes the peak has grown at the end of the block, will be in the list."""
    small = torch.randn(64, 64, device=device)
    _ = small @ small  # loads what every computation needs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak(device)
    grown: list[int] = []
    yield grown
    grown.append(_peak(device) - before)


def _peak(device: torch.device) -> int:
    """Bytes that were allocated at most on a GPU, or resident at most in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage on Linux: there a process begins with the peak of the one that started it
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _elsewhere(measure: Callable[..., int], *arguments: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool as error:
            raise BenchError(
                "the process in which memory is measured was killed: this machine may have too little of it"
            ) from error
